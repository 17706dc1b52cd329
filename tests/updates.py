"""One whole update, as srft.train makes it, for tests."""
import srft


def whole_update(policy, optimizer, micro_batches, sequences, cfg, device, reference=None,
                 measure_terms=False):
    """Its metrics. micro_batches: this rank's; sequences: all of the update."""
    objective = srft.load_objective(cfg)
    extras = [{} for _ in micro_batches]
    if objective is not srft.srft_loss:
        extras = objective.before_update(policy, micro_batches, sequences, device)
    return srft.update_policy(policy, optimizer, objective, sequences, micro_batches, extras, reference, cfg,
                              device, measure_terms)
