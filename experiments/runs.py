"""The runs of tiny_paper.py: what Tables 1-3, the switches and the reviewers' questions are made of.

A run's name says what it is: "sft-28>grpo" is 28 steps of SFT, then RL for the rest; "srft weak" is SRFT on
weak demonstrations; "srft --loss_norm token" is SRFT with that flag. A part is a dictionary, name -> Run.
"""
from dataclasses import dataclass, field

STEPS, STAGE = 40, 28              # of every paradigm; of SFT in sequences: 70 %, as 350 of the paper's 500
REST = STEPS - STAGE
# Learning rates to try, and one more where the best is at an edge; or another run's best, its half and its
# double, and so on where the best is at an edge.
GRID, BEYOND = (1e-4, 3e-4, 1e-3, 3e-3), (3e-5, 1e-2)
RATES = sorted({rate * 2.0**n for rate in (*GRID, *BEYOND) for n in range(-6, 7)})
TUNING_SEED = 100


@dataclass(frozen=True)
class Run:
    """One run of srft.py. start: the run whose hf/ it starts from; lr: the run whose tuned rate it takes, or
    a rate; near: the run about whose tuned rate its own is looked for; every: steps between evaluations, 0:
    at its start and end alone; seeds: how many at most.

    Its repr() stands in each result: that counts as long as this is the run's definition.
    """
    method: str
    steps: int = STEPS
    start: str = ""
    flags: tuple = ()
    lr: str | float = ""
    near: str = ""
    every: int = 0
    seeds: int = field(default=10, repr=False)


def sequence(first, second, switch):
    """The two runs of a sequence that switches after `switch` steps; the first has its method's own rate."""
    return {f"{first}-{switch}": Run(first, switch, lr=first, every=8),
            f"{first}-{switch}>{second}": Run(second, STEPS - switch, f"{first}-{switch}", every=4)}


def variants(methods, suffix, *flags, tuned=True):
    """The same methods with these flags, each tuned itself, or by the rate of its method without them."""
    runs = {}
    for name in methods:
        runs[f"{name} {suffix}"] = Run(name, flags=flags, lr="" if tuned else name)
    return runs


TABLE1 = {
    "sft": Run("sft", every=8),
    "grpo": Run("grpo", every=8),
    **sequence("sft", "grpo", STAGE),
    **sequence("grpo", "sft", REST),
    f"grpo-{REST}>sft_kl": Run("sft_kl", STAGE, f"grpo-{REST}", ("--reference", "tiny"), every=4),
    # both stages in full, twice the budget: the paper speaks of SFT after RL that has converged
    "sft>grpo": Run("grpo", start="sft", every=4),
    "grpo>sft": Run("sft", start="grpo", every=4),
    "grpo>sft_kl": Run("sft_kl", start="grpo", flags=("--reference", "tiny"), every=4)}
TABLE2 = {
    **{name: Run(name, every=8) for name in ("sft_kl", "sft+rl", "luffy", "relift", "srft")},
    **sequence("sft", "grpo", 12),
    **sequence("sft", "grpo", 20),
    "grpo-truncated": Run("grpo", flags=("--entropy_quantile", "0.8"), lr="grpo", every=8)}
TABLE3 = {
    "srft-w_sft-1": Run("srft", flags=("--w_sft", "one"), every=8),
    "srft-w_rl-1": Run("srft", flags=("--w_rl", "one"), every=8)}
SWITCHES = {f"srft {flags}": Run("srft", flags=tuple(flags.split()), lr="srft") for flags in (
    "--w_sft constant --w_rl constant", "--w_sft_sign 1", "--eq12_advantage", "--demo_shaping 0.1",
    "--loss_norm token", "--entropy_level token", "--entropy_level batch", "--demo_in_group replaces",
    "--no-std_in_advantage")}
REVIEWS = {
    **{name: TABLE2[name] for name in ("sft-12", "sft-12>grpo")},
    "sft-12>srft": Run("srft", 28, "sft-12"),
    **variants(("sft", "sft+rl", "luffy", "srft"), "weak", "--data", "out/tiny_paper/weak.jsonl",
               tuned=False)}
SECOND_FAMILY = variants(("sft", "grpo", "sft+rl", "srft"), "qwen3", "--model", "experiments/qwen3")
# What Fig. 3 measures distances to, in the place of DeepSeek-R1 and QwQ-32B: experts, each in its own style.
EXPERTS = {
    f"expert-{style}": Run("sft", 2 * STEPS, flags=("--data", f"out/tiny_paper/{style}.jsonl"), lr="sft")
    for style in ("careful", "plain")}

# Equal compute. A budget is the FLOPs of 40 steps of SRFT: about those of 400 of SFT, or of 52 of RL.
# A run goes on for four of them and is read on the way; of SFT, whose rate falls to 0, there is one for each.
BUDGETS, SFT_STEPS, RL_STEPS = (1, 2, 4), 400, 52
PARADIGMS = {"srft": 40, "sft+rl": 40, "luffy": 49, "grpo": RL_STEPS}              # steps of a budget
STAGES = (48, 160, SFT_STEPS)                       # of SFT before RL: 3, 10 and 25 epochs


def equal_compute():
    """(the runs, those that are there to tune them: one budget each)"""
    runs, trials = {}, {}
    for name, steps in PARADIGMS.items():
        trials[f"{name} trial"] = Run(name, steps, near=name)
        runs[f"{name} long"] = Run(name, 4 * steps + 8, lr=f"{name} trial", every=8)
    for steps in STAGES:
        start = f"sft {steps}"
        runs[start] = Run("sft", steps, near="sft", every=80)
        rest = round((1 - steps / SFT_STEPS) * RL_STEPS) or RL_STEPS // 2
        trials[f"{start}>grpo trial"] = Run("grpo", rest, start, near="sft-28>grpo")
        runs[f"{start}>grpo"] = Run("grpo", 4 * RL_STEPS, start, lr=f"{start}>grpo trial", every=8)
    for budget in BUDGETS:
        if budget > 1:
            steps = budget * SFT_STEPS
            runs[f"sft {steps}"] = Run("sft", steps, lr=f"sft {SFT_STEPS}", every=80)
        steps, rest = budget * RL_STEPS // 2, budget * SFT_STEPS // 2 + 16       # 16: to reach the budget
        how = {"lr": f"grpo {RL_STEPS // 2}>sft"} if budget > 1 else {"near": f"grpo-{REST}>sft"}
        runs[f"grpo {steps}"] = Run("grpo", steps, lr="grpo trial")
        runs[f"grpo {steps}>sft"] = Run("sft", rest, f"grpo {steps}", every=40, **how)
    return runs, trials


# What follows is read at one budget, too: runs go on for a little longer, and are evaluated on the way.
LONGER, REST_OF_RL = 8, 32       # steps; of RL after 160 steps of SFT, where about 20 are left of a budget


def larger(width):
    """The same task for a larger model: 256 has 3.1M parameters (tiny/make.py)."""
    flags, runs = ("--model", f"out/tiny_paper/llama-{width}"), {}
    for name, method, near, more in (
            ("srft", "srft", "srft trial", ()), ("sft+rl", "sft+rl", "sft+rl trial", ()),
            ("grpo", "grpo", "grpo trial", ()), ("srft-w_rl-1", "srft", "srft-w_rl-1", ("--w_rl", "one"))):
        runs[f"{name} {width}"] = Run(method, PARADIGMS[method] + LONGER, flags=(*flags, *more), near=near,
                                      every=8, seeds=3)
    first = f"sft 160 {width}"
    runs[first] = Run("sft", 160, "", flags, near="sft 160", every=80, seeds=3)
    runs[f"{first}>grpo"] = Run("grpo", REST_OF_RL, first, near="sft 160>grpo trial", every=8, seeds=3)
    runs["srft-w_rl-1 longer"] = Run("srft", PARADIGMS["srft"] + LONGER, flags=("--w_rl", "one"),
                                     lr="srft-w_rl-1", every=8)            # of the shipped size
    return runs


# Learning rates from half of SRFT's best to 16 times that. With one update a step, Eq. 12 on the log and on
# the ratio are one.
STABLE_RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
RATIO, ROLLOUTS_ALONE = ("--eq12_form", "ratio"), ("--terms", "rl_pos,rl_neg")
VARIANTS = {"SRFT": (), "w_RL = 1": ("--w_rl", "one"), "Eq. 12 alone": ROLLOUTS_ALONE,
            "SRFT, ratio": RATIO, "Eq. 12 alone, ratio": (*ROLLOUTS_ALONE, *RATIO)}


def stability():
    """{name: Run}: VARIANTS at each rate, with one and with two updates a step."""
    runs = {}
    for updates in (1, 2):
        for label, flags in VARIANTS.items():
            if updates == 1 and "ratio" in label:
                continue
            flags = (*flags, "--updates_per_rollout", str(updates))
            for rate in STABLE_RATES:
                runs[f"{label}, {updates} x {rate:g}"] = Run("srft", flags=flags, lr=rate, seeds=2)
    return runs


SLIPS = {0: 0.0, 18: 0.03, 40: 0.08, 60: 0.15}      # percent of wrong demonstrations: slips a line


def quality():
    """{name: Run}: paradigms on demonstrations of which a share of SLIPS is wrong."""
    runs = {}
    for share in SLIPS:
        data, wrong = ("--data", f"out/tiny_paper/wrong-{share}.jsonl"), f"{share} % wrong"
        for name, method, more in (("srft {}", "srft", ()), ("luffy {}", "luffy", ()),
                                   ("srft {}, not imitated", "srft", ("--no-imitate_wrong",))):
            steps = PARADIGMS[method] + LONGER
            runs[name.format(wrong)] = Run(method, steps, "", (*data, *more), method, every=8)
        first = f"sft 160 {wrong}"
        runs[first] = Run("sft", 160, "", data, "sft 160", every=80)
        runs[f"{first}>grpo"] = Run("grpo", REST_OF_RL, first, lr="sft 160>grpo trial", every=8)
    return runs


EQUAL_COMPUTE, TRIALS = equal_compute()
LARGER, STABILITY, QUALITY = larger(256), stability(), quality()

# A result lies in the file of the first table that has it.
TABLES = {"table1": TABLE1, "table2": TABLE2, "table3": TABLE3, "switches": SWITCHES, "reviews": REVIEWS,
          "second_family": SECOND_FAMILY, "equal_compute": EQUAL_COMPUTE, "larger": LARGER,
          "stability": STABILITY, "quality": QUALITY, "trials": TRIALS, "experts": EXPERTS}
RUNS = {name: run for table in TABLES.values() for name, run in table.items()}
PARTS = {"table1": TABLE1, "table2": TABLE1 | TABLE2, "table3": {"srft": TABLE2["srft"], **TABLE3},
         "switches": {"srft": TABLE2["srft"], **SWITCHES},
         "reviews": TABLE1 | TABLE2 | REVIEWS | SECOND_FAMILY, "equal_compute": EQUAL_COMPUTE,
         "larger": LARGER, "stability": STABILITY, "quality": QUALITY}
SHOWN = {"SFT": "sft", "RL": "grpo", "SRFT": "srft"}    # in Fig. 2 and 3
TRAJECTORY = (f"sft-{STAGE}", f"sft-{STAGE}>grpo")      # Fig. 3 shows this one, too


def table_of(name):
    """The first table that has a run."""
    return next(table for table, runs in TABLES.items() if name in runs)
