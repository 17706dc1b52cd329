"""One whole update, as srft.train makes it, for tests."""
import srft


def whole_update(policy, optimizer, micro_batches, sequences, cfg, device, reference=None,
                 measure_terms=False):
    """Its metrics. micro_batches: this rank's; sequences: all of the update."""
    objective = srft.load_objective(cfg)
    asked = [{} for _ in micro_batches]
    if objective is not srft.srft_loss:
        asked = objective.before_update(policy, micro_batches, sequences, device)
    n_demo = sum(s.is_demo for s in sequences)

    def add_gradients(objective):
        return srft.backward(objective, policy, micro_batches, asked, n_demo, len(sequences) - n_demo,
                             reference, cfg, device)

    norms = {}
    if measure_terms:
        from paper.readings import term_gradient_norms
        norms = term_gradient_norms(add_gradients, objective, policy)
    return srft.update_policy(policy, optimizer, add_gradients(objective), cfg.grad_clip) | norms
