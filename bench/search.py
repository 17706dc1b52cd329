"""Which flags make a run fit its cards, and which of them make its step the shortest?

    cards = read_cards("8x80")
    memory = plan.simulate(config, cfg, cards.number)
    activations = Activations(config, cfg, cards.number)
    proposed, memory = propose(config, cfg, cards, memory, activations)       # or None
    print(flags(cfg, proposed))                                               # --recompute 9 --offload

Searched are --micro_batch_tokens, --recompute, --engine_memory and --offload, none of which changes what is
learned; --offload only where nothing fits without, as it takes host memory and its time is the least certain.
Memory is bench/plan.py's, time is bench/steptime.py's at typical lengths.
"""
import dataclasses
import itertools
import re
from dataclasses import dataclass, replace

from bench import plan, steptime
from config import recomputed_blocks
from rollout import kv_bytes

SEARCHED = ("offload", "engine_memory", "micro_batch_tokens", "recompute")
MICRO_BATCHES = (16_384, 32_768, 65_536)         # tried, beside the longest sequence, which one must hold
FEW, MANY = 4096, 32_768  # tokens of the simulated micro-batches; no smaller one is tried
ENGINE_SHARES = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)
ENOUGH = 1.02            # a flag stays as it was asked for where that costs less than 2 % of the step
BLOCKS = 4               # of the model whose activations are simulated
SHORTEST = 256           # tokens of a response, below which none is proposed


@dataclass(frozen=True)
class Cards:
    """What a plan is for."""
    number: int
    memory: float        # bytes of each, as its name promises: 80 GB are 80e9

    def __str__(self):
        return f"{self.number} x {self.memory / 1e9:g} GB"


def read_cards(text):
    """--dry_run_cards "8x80" -> Cards. Raises ValueError with what was expected."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    number, gb = (int(found[1]), float(found[2])) if found else (0, 0.0)
    whole = number <= plan.NODE or number % plan.NODE == 0
    if number < 1 or not 0 < gb <= 10_000 or not whole:
        raise ValueError(f"--dry_run_cards {text}: must be their number x the GB of each, as 8x80; up to "
                         f"{plan.NODE} on one node, or whole nodes of {plan.NODE}")
    return Cards(number, gb * 1e9)


# ----------------------------------------------------------------------------------------------------------
# Memory of any flags, from a few simulations.

class Activations:
    """Bytes of activations at their peak, for any micro-batch and any number of recomputed blocks.

    A simulation of 28 blocks takes half a minute, and blocks are alike. So models of 4 blocks are simulated,
    for the smallest and the largest micro-batch, and tell the rest:

        activations = constant + tokens (shared + input x recomputed blocks + kept x other blocks)

    input: what a recomputed block keeps, its input in bf16. kept: what another one keeps for its backward.
    Where all are recomputed, constant and shared are others: the head works before a block is run again. The
    peak is the highest of several such lines, so between the two micro-batches it lies below, if anything.
    """

    def __init__(self, config, cfg, world, few=FEW, many=MANY):
        self.blocks, self.few, self.many = config.num_hidden_layers, few, many
        self.input = 2 * config.hidden_size                                                  # bytes a token
        fields = config.to_dict() | {"num_hidden_layers": BLOCKS}
        fields.pop("layer_types", None)
        small = type(config).from_dict(fields)

        def simulated(tokens, recomputed):
            asked = replace(cfg, micro_batch_tokens=tokens, recompute=str(recomputed))
            return plan.simulate(small, asked, world)["activations"]

        self.all = simulated(few, BLOCKS), simulated(many, BLOCKS)
        self.half = simulated(few, BLOCKS // 2), simulated(many, BLOCKS // 2)
        more = simulated(many, 0) - self.half[1]                     # half of them kept, whose inputs were
        self.kept = self.input + more / (many * BLOCKS // 2)                                 # bytes a token

    def __call__(self, tokens, recomputed):
        def between(ends):
            return ends[0] + (ends[1] - ends[0]) * (tokens - self.few) / (self.many - self.few)

        if recomputed == self.blocks:
            return between(self.all) + tokens * self.input * (recomputed - BLOCKS)
        inputs, kept = recomputed - BLOCKS // 2, self.blocks - recomputed - BLOCKS // 2
        return between(self.half) + tokens * (self.input * inputs + self.kept * kept)


def fits(config, cfg, cards, memory):
    """Do both phases fit, and one whole sequence into the KV cache? memory: as from plan.simulate."""
    _, (training, generating), room = plan.budget(cfg, memory, cards.memory)
    longest = (cfg.max_prompt_tokens + cfg.max_response_tokens) * kv_bytes(config)
    return plan.fits(training, generating, cards.memory) and room >= longest


# ----------------------------------------------------------------------------------------------------------
# The search.

class Search:
    """Candidates for one run on its cards. memory: of the run as asked, from plan.simulate; of it, what does
    not depend on the flags that are searched."""

    def __init__(self, config, cfg, cards, memory, activations):
        self.config, self.cfg, self.cards, self.memory = config, cfg, cards, memory
        self.activations = activations
        smallest = max(FEW, cfg.max_prompt_tokens + cfg.max_response_tokens)
        larger = [tokens for tokens in (*MICRO_BATCHES, cfg.micro_batch_tokens) if tokens > smallest]
        self.micro_batches = sorted({smallest, *larger})
        self.counts = plan.counts(config, memory)
        self.sampled, self.times = {}, {}

    def seconds(self, cfg):
        """Modelled time of a step of typical lengths. Generation, which takes longest to model, depends on
        --engine_memory alone."""
        m = steptime.machine(self.cards.number, self.cards.memory, cfg.offload)
        key = tuple(getattr(cfg, name) for name in SEARCHED)
        if key not in self.times:
            known = self.sampled.get(cfg.engine_memory)
            found = steptime.step_time(m, self.config, cfg, self.counts, plan.TYPICAL[1], sampled=known)
            self.sampled[cfg.engine_memory] = found["sampled"]
            self.times[key] = found["step"]
        return self.times[key]

    def fits(self, cfg, spare):
        """By the formula for activations, `spare` times what it says."""
        recomputed = recomputed_blocks(cfg, self.config.num_hidden_layers)
        activations = spare * self.activations(cfg.micro_batch_tokens, recomputed)
        memory = plan.place(self.config, cfg, activations, self.memory["shards"], self.memory["parameters"],
                            self.cards.number > plan.NODE)
        return fits(self.config, cfg, self.cards, memory)

    def first_that_fits(self, cfg, spare):
        """`cfg` with as few blocks recomputed, and as much of the card for the engine, as fit; or None."""
        names = ["none", *map(str, range(1, self.config.num_hidden_layers)), "all"]
        for recompute, share in itertools.product(names, ENGINE_SHARES):
            candidate = replace(cfg, recompute=recompute, engine_memory=share)
            if self.fits(candidate, spare):
                return candidate
        return None

    def candidates(self, offload, spare):
        """The best of each micro-batch."""
        found = []
        for tokens in self.micro_batches:
            placed = replace(self.cfg, offload=offload, micro_batch_tokens=tokens)
            found.append(self.first_that_fits(placed, spare))
        return list(filter(None, found))

    def fastest(self, spare):
        """The candidate with the shortest step, and as many flags as asked for as that allows; None if none
        fits."""
        candidates = self.candidates(False, spare)
        if self.cfg.offload or not candidates:
            candidates += self.candidates(True, spare)
        if not candidates:
            return None
        best = min(candidates, key=self.seconds)
        limit = ENOUGH * self.seconds(best)
        for name in SEARCHED:
            simpler = replace(best, **{name: getattr(self.cfg, name)})
            if self.fits(simpler, spare) and self.seconds(simpler) <= limit:
                best = simpler
        return best


def propose(config, cfg, cards, memory, activations, simulate=plan.simulate):
    """(Config, memory) of the fastest flags that fit, simulated as they are; None if none do. memory: of cfg,
    from `simulate`."""
    search = Search(config, cfg, cards, memory, activations)
    for spare in (1.0, 1.03, 1.1):                # the formula is no simulation: it may be a little too low
        best = search.fastest(spare)
        if best is None:
            return None
        simulated = simulate(config, best, cards.number)
        if fits(config, best, cards, simulated):
            return best, simulated
    return None


def propose_shorter(config, cfg, cards, memory, activations, simulate=plan.simulate):
    """The same with responses half as long, or a quarter, ..., as long as they can be; None if none fit."""
    response = cfg.max_response_tokens // 2
    while response >= SHORTEST:
        shorter = replace(cfg, max_response_tokens=response)
        found = propose(config, shorter, cards, memory, activations, simulate)
        if found:
            return found
        response //= 2
    return None


def flags(asked, proposed):
    """What to add to a command line that says `asked`."""
    words = []
    for field in dataclasses.fields(asked):
        value = getattr(proposed, field.name)
        if value == getattr(asked, field.name):
            continue
        if field.type is bool:
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words.append(f"--{field.name} {value}")
    return " ".join(words)
