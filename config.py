"""One run's configuration: every choice the paper makes or leaves open, as a documented field and a flag.

    parse_args(["--preset", "tiny", "--steps", "100"])         # -> Config; `srft.py --help` lists the flags

The defaults are the paper's 7B run (Sec. 5.1, App. B). Where the paper is silent or contradicts itself,
docs/decisions.md says what was chosen and why.
"""
import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from data import TEMPLATES
from grading import custom
from reward import TEXTS
from support.flags import Parser, ShowVersions, flags_of_run, what_sets_what
from support.intervals import check_interval


def opt(default, group, help, choices=None, within=None):
    """A field with what the command line needs: its group, its help text, and its allowed values, or the
    interval that a number must lie in, as support.intervals writes it."""
    metadata = {"group": group, "help": help, "choices": choices, "within": within}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a paradigm trains on, which flags of the objective it heeds, and what the paper sets for it."""
    rollouts: bool        # samples G rollouts a prompt
    demos: str            # "group": demonstrations are in the rollouts' group (Eq. 6)
    #                       "beside": they are learned, without an advantage
    #                       "none": they are left out
    #                       "failed": they are learned where all rollouts failed
    heeds: tuple = ()
    flags: dict = field(default_factory=dict)


# Flags that ask for more than srft.srft_loss: another reading of the paper, log pi_old for later updates, or
# the gradient of each term. paper/readings.py has the first two, paper/baselines.py the third.
READINGS = ("loss_norm", "w_sft", "w_rl", "w_sft_sign", "entropy_level", "demo_shaping", "eq12_form",
            "eq12_advantage", "imitate_wrong", "terms", "entropy_coef", "kl_coef", "updates_per_rollout",
            "term_gradients")
TERMS = ("sft_demo", "rl_demo", "rl_pos", "rl_neg")              # of Eq. 13: see srft.srft_loss
SURROGATE = ("clip_eps", "tis_cap", "std_in_advantage")         # what the losses on Eq. 3 ask for
TRUNCATION = ("entropy_floor", "entropy_quantile")              # App. A.2
SFT = {"lr": 5e-6, "lr_schedule": "linear", "steps": 1078}      # App. B; 3 epochs of 46,000 in batches of 128
METHODS = {
    "srft": Method(rollouts=True, demos="group", heeds=(
        "std_in_advantage", "w_sft", "w_rl", "w_sft_sign", "entropy_level", "demo_shaping", "eq12_form",
        "eq12_advantage", "imitate_wrong", "terms", "entropy_coef", "kl_coef", "reference", "tis_cap",
        "demo_in_group")),
    "sft": Method(rollouts=False, demos="beside", flags=SFT),
    "sft_kl": Method(rollouts=False, demos="beside", heeds=("kl_coef", "reference"),
                     flags={**SFT, "kl_coef": 0.2}),
    "grpo": Method(rollouts=True, demos="none", heeds=(*SURROGATE, *TRUNCATION)),
    "sft+rl": Method(rollouts=True, demos="beside", heeds=(*SURROGATE, *TRUNCATION)),
    "luffy": Method(rollouts=True, demos="group", heeds=(*SURROGATE, "demo_in_group", "demo_shaping"),
                    flags={"demo_in_group": "replaces", "demo_shaping": 0.1}),
    "relift": Method(rollouts=True, demos="failed", heeds=(*SURROGATE, *TRUNCATION)),
}
# Flags that some methods heed and others do not.
FLAGS_OF_METHODS = set().union(*(method.heeds for method in METHODS.values()))


# What a resumed run must not change: these flags, and the content of what these name. --model may change,
# since the checkpoint has the weights, unless a KL is taken to it.
SAME_FLAGS = ("method", "template", "seed", "rope_theta")
SAME_CONTENT = {"data": "--data", "reference": "the base model of the KL (--reference, else --model)",
                "rope": "the RoPE theta of --model"}
GRADING = ("grade_text", "strict_box", "strict_answer", "score_unfinished")    # what a reward depends on


@dataclass
class Config:
    """One run. `G`, `H`, `A`, `w_SFT`, `w_RL` are the paper's symbols."""
    # The run: what to train, from what, for how long, and what to write.
    model: str = opt("Qwen/Qwen2.5-Math-7B", "run",
        "base model: a Hugging Face folder, or a hub name, NAME or NAME@REVISION (Sec. 5.1)")
    data: str = opt("Elliott/Openr1-Math-46k-8192", "run",
        "D, with D_demo: problems, answers, demonstrations; a parquet or JSONL file, a folder of "
        "them, or a hub name, NAME[@REVISION][/FOLDER] (Sec. 5.1)")
    out: str = opt("out/srft", "run",
        "the run's own folder")
    method: str = opt("srft", "run",
        "paradigm: SRFT (Eq. 13); SFT (Eq. 1), with KL (A1); GRPO (Eq. 3); SFT+RL in one stage (Sec. "
        "3.2.2); LUFFY; ReLIFT. Each brings the paper's own defaults of other flags",
        choices=tuple(METHODS))
    device: str = opt("auto", "run",
        "auto: the GPU if torch is built for one, and an error if it cannot be used; else the CPU",
        choices=("auto", "cuda", "cpu"))
    seed: int = opt(0, "run",
        "seed of data order and sampling", within="[0, 4294967295]")
    steps: int = opt(500, "run",
        "training steps, each with fresh rollouts (App. B: 500)", within="[1, inf)")
    resume: bool = opt(False, "run",
        "continue from the newest whole checkpoint in --out; starts anew if there is none")
    save_every: int = opt(50, "run",
        "steps between checkpoints (one is always written at the end)", within="[1, inf)")
    keep: int = opt(2, "run",
        "checkpoints kept", within="[1, inf)")
    hang_minutes: float = opt(30.0, "run",
        "a rank that spends more than this in one phase (rollout, train, checkpoint, ...) or waits "
        "that long for another ends the run, and the rank behind is named; until the first step is "
        "done, 120", within="(0, 525600]")
    track: str = opt("auto", "run",
        "also send metrics, samples and curves to this tracker (pip install NAME); auto: TensorBoard "
        "where it is installed",
        choices=("auto", "none", "tensorboard", "wandb", "trackio"))
    profile: int = opt(0, "run",
        "write a torch profiler trace of this step to profile/ in --out, with every token's decoding: "
        "open it in Perfetto or chrome://tracing; 0: none", within="[0, inf)")
    dry_run: bool = opt(False, "run",
        "print whether this configuration fits --dry_run_cards, which flags make it fit or faster, memory, "
        "disk, and the time of a step; then stop")
    dry_run_cards: str = opt("8x80", "run",
        "cards that --dry_run plans for, their number x the GB of each, 8 a node: 1x24, 64x80; a run itself "
        "takes those that torchrun starts")

    # Prompts and demonstrations (Sec. 5.1, App. B).
    template: str = opt("paper", "data",
        "prompt template: Fig. A3, Fig. A4, none, LUFFY's, or the tokenizer's own",
        choices=tuple(TEMPLATES))
    max_prompt_tokens: int = opt(1024, "data",
        "longer prompts are dropped and counted", within="[1, inf)")
    max_response_tokens: int = opt(8192, "data",
        "rollouts are cut here; longer demonstrations are dropped (Sec. 5.1)", within="[1, inf)")
    rope_theta: float = opt(40_000.0, "data",
        "RoPE theta (App. B: 10,000 -> 40,000); 0 keeps the model's own, and at the default a model of "
        "another than 10,000 keeps its own, too", within="[0, inf)")
    window: int = opt(16_384, "data",
        "context window in tokens (App. B: 16,384); 0 keeps the model's own", within="[0, inf)")
    skip_bad_rows: bool = opt(False, "data",
        "skip and count unreadable rows instead of stopping at the first")

    # What a step samples: 128 prompts x 8 rollouts, and how they become sequences of the loss.
    prompts_per_step: int = opt(128, "rollouts",
        "prompts x sampled each step, over all ranks", within="[1, inf)")
    n_rollouts: int = opt(8, "rollouts",
        "G: rollouts per prompt (App. B: 8)", within="[1, inf)")
    temperature: float = opt(1.0, "rollouts",
        "of sampling, and of log pi and H; top_p and top_k stay off", within="(0, inf)")
    demo_in_group: str = opt("joins", "rollouts",
        "the demonstration joins the G rollouts (Eq. 6: 8+1), or replaces one (7+1, public code; a prompt "
        "without demonstration has 7, too)",
        choices=("joins", "replaces"))
    updates_per_rollout: int = opt(1, "rollouts",
        "optimizer updates a step, each on its share of the prompts; Eq. 11 assumes 1, public code "
        "makes 2", within="[1, inf)")
    tis_cap: float = opt(2.0, "rollouts",
        "cap of the importance weight pi/pi_engine on rollout tokens, which corrects for the engine's "
        "numerics; 0: no weight", within="[0, inf)")

    # Readings of Eq. 2-13; docs/decisions.md says why these are the defaults.
    std_in_advantage: bool = opt(True, "objective",
        "A is divided by the group's standard deviation (Eq. 2, 7)")
    loss_norm: str = opt("sequence", "objective",
        "a response's sum over tokens is divided by |y_i| (Eq. 3), by all tokens of its kind, or by "
        "max_response_tokens",
        choices=("sequence", "token", "constant"))
    w_sft: str = opt("entropy", "objective",
        "w_SFT of Eq. 8: 0.5 exp(-H); 1.0 (Table 3, w/o w_SFT); or 0.5",
        choices=("entropy", "one", "constant"))
    w_rl: str = opt("entropy", "objective",
        "w_RL of Eq. 12: 0.1 exp(H); 1.0 (Table 3, w/o w_RL); or 0.1",
        choices=("entropy", "one", "constant"))
    w_sft_sign: int = opt(-1, "objective",
        "sign of H in w_SFT: -1 is Eq. 8; +1 is reported of the authors' code",
        choices=(-1, 1))
    entropy_level: str = opt("sequence", "objective",
        "H in the weights: each sequence's mean, each token's own, or the mean over the update's sequences "
        "of its kind (costs a second forward)",
        choices=("sequence", "token", "batch"))
    demo_shaping: float = opt(0.0, "objective",
        "gamma of pi/(pi+gamma) in place of pi in Eq. 9-10; LUFFY: 0.1", within="[0, inf)")
    eq12_form: str = opt("log", "objective",
        "Eq. 12 on log pi, or on the ratio pi/pi_old",
        choices=("log", "ratio"))
    eq12_advantage: bool = opt(False, "objective",
        "Eq. 12 scaled by the group's A instead of +1 and -1")
    imitate_wrong: bool = opt(True, "objective",
        "Eq. 8 is on all demonstrations; off: on those whose answer is right")
    terms: str = opt("all", "objective",
        "the terms of Eq. 13 that count, by commas: some of sft_demo, rl_demo, rl_pos, rl_neg; or all")
    entropy_coef: float = opt(0.0, "objective",
        "entropy bonus on rollouts (public code: 0.001)", within="[0, inf)")
    kl_coef: float = opt(0.0, "objective",
        "weight of KL(pi || base model) over the whole vocabulary: lambda of A1 (0.2), on "
        "demonstrations; with srft a penalty on rollouts. A second model", within="[0, inf)")
    reference: str = opt("", "objective",
        "the base model of that KL; empty: --model")
    clip_eps: float = opt(0.2, "objective",
        "epsilon of Eq. 3; only updates after a step's first can be clipped", within="(0, 1)")
    entropy_floor: float = opt(0.0, "objective",
        "tokens of rollouts with H_t below it, in nats, give no gradient (App. A.2)", within="[0, inf)")
    entropy_quantile: float = opt(0.0, "objective",
        "the same, the floor being this quantile of the update's H_t: 0.8 keeps a fifth of the tokens "
        "(costs a second forward)", within="[0, 1)")
    term_gradients: int = opt(0, "objective",
        "every so many steps, measure the gradient norm of each loss term alone (costs a forward and "
        "backward a term); 0: never", within="[0, inf)")

    # AdamW and what fits on a card.
    lr: float = opt(1e-6, "optimization",
        "AdamW learning rate (App. B: 1e-6; SFT: 5e-6)", within="(0, inf)")
    lr_schedule: str = opt("constant", "optimization",
        "constant, or linear: up during --warmup, then down to 0 (App. B: SFT)",
        choices=("constant", "linear"))
    warmup: float = opt(0.1, "optimization",
        "share of the steps in which a linear schedule rises", within="[0, 1)")
    weight_decay: float = opt(0.01, "optimization",
        "AdamW weight decay", within="[0, inf)")
    grad_clip: float = opt(1.0, "optimization",
        "gradient norm clip", within="(0, inf]")
    micro_batch_tokens: int = opt(9216, "optimization",
        "packed tokens per forward and rank, a hard limit", within="[1, inf)")
    recompute: str = opt("6", "optimization",
        "decoder blocks that run forward a second time in backward instead of keeping what backward needs: "
        "all, none, or a number, the first so many; 6 of 28 suit the paper's run on 8 cards of 80 GB")
    offload: bool = opt(False, "optimization",
        "fp32 weights, gradients and AdamW's moments in host memory instead of the GPU's: slower, for "
        "few cards")

    # The vLLM engine and the grader.
    engine_memory: float = opt(0.6, "engine",
        "share of each GPU for vLLM's weights and KV cache while it is awake", within="(0, 1]")
    engine_sequences: int = opt(256, "engine",
        "sequences a rank decodes at once", within="[1, inf)")
    engine_eager: bool = opt(False, "engine",
        "no CUDA graphs in the engine (on CPU always so)")
    reward: str = opt("", "engine",
        "FILE.py:FUNCTION, a reward of one's own in place of Math-Verify: function(response, answer, "
        "example) -> bool; see docs/data.md")
    grader_workers: int = opt(0, "engine",
        "grading processes a rank; 0: the cores divided by the node's ranks, less one for the engine",
        within="[0, 4096]")
    grade_text: str = opt("after_think", "engine",
        "what is graded: the text after the last </think>, all of it, or nothing without a </think> "
        "(LUFFY)",
        choices=TEXTS)
    strict_box: bool = opt(True, "engine",
        "Math-Verify grades the last closed \\boxed{} only; off: whatever it takes for an answer in "
        "the text")
    strict_answer: bool = opt(True, "engine",
        "an answer equal to the reference earns 1 only if it is worked out as far (47+35-60 is not, for 22) "
        "and is the one answer that its box states (41 = 42 is not, for 42); off: equal is enough")
    score_unfinished: bool = opt(False, "engine",
        "a response cut at its limit is graded like any other; off: it earns 0")
    grader_deadline: float = opt(10.0, "engine",
        "seconds until a grading process is killed, and its reward is 0", within="(0, 86400]")

    # Held-out accuracy on the way (App. B: temperature 0.6).
    eval_data: str = opt("", "evaluation",
        "held-out sets (as --data), separated by commas; empty: no evaluation")
    eval_every: int = opt(50, "evaluation",
        "steps between evaluations; also at the start and the end", within="[1, inf)")
    eval_samples: int = opt(1, "evaluation",
        "responses a problem (avg@n)", within="[1, inf)")
    eval_temperature: float = opt(0.6, "evaluation",
        "sampling temperature (App. B: 0.6)", within="[0, inf)")
    eval_top_p: float = opt(1.0, "evaluation",
        "nucleus sampling", within="(0, 1]")
    log_samples: int = opt(4, "evaluation",
        "rollouts a step written to samples.jsonl", within="[0, inf)")


TINY = str(Path(__file__).resolve().parent / "tiny")
PRESETS = {
    "paper": {},
    "one_gpu": dict(model="Qwen/Qwen2.5-Math-1.5B", out="out/one_gpu", hang_minutes=120.0,
                    recompute="none", dry_run_cards="1x80"),
    "tiny": dict(model=TINY, data="tiny:train", out="out/tiny", template="none", steps=80,
                 prompts_per_step=16, max_prompt_tokens=48, max_response_tokens=160, rope_theta=0.0,
                 window=0, lr=3e-4, save_every=20, micro_batch_tokens=4096, recompute="none",
                 engine_sequences=128, eval_every=20, eval_data="tiny:heldout,tiny:long"),
}


# What a run's config.json holds beside its flags; and two flags that are not taken from there: --out may have
# been moved since.
NOT_OF_THE_RUN = {"ranks", "hub", "machine", "git_commit", "python", "versions", "resume", "out"}


def parse_args(argv=None, description=__doc__):
    """The command line -> Config. Unknown flags are errors. What is given wins; then, with --resume, what
    the run has in its config.json; then --preset; then what --method brings."""
    brought = {f"--preset {name}": flags for name, flags in PRESETS.items()}
    brought |= {f"--method {name}": method.flags for name, method in METHODS.items() if method.flags}
    parser = Parser(prog="srft.py", description=description, epilog=what_sets_what(brought))
    parser.add_argument("--version", action=ShowVersions)
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                        help="paper: the paper's 7B run; one_gpu: a 1.5B model on one card of 80 GB; tiny: a "
                        "built-in task and model for a laptop's CPU; what each sets is below [paper]")
    groups = {}
    for f in dataclasses.fields(Config):
        name, choices = f.metadata["group"], f.metadata["choices"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        how = {"type": f.type, "choices": choices, "metavar": None if choices else f.type.__name__.upper()}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}             # --resume and --no-resume
        help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        # Without a default here, `given` holds only what was on the command line.
        groups[name].add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **how)
    given = vars(parser.parse_args(argv))
    if "dry_run_cards" in given and not given.get("dry_run"):
        parser.error("--dry_run_cards is for a plan, not for a run: pass --dry_run with it")
    preset = PRESETS[given.pop("preset", "paper")]
    if given.get("resume"):
        out = given.get("out", preset.get("out", Config.out))
        own = flags_of_run(parser, out, Config.__dataclass_fields__, leave=NOT_OF_THE_RUN)
        given = {**own, **given}
    method = METHODS[given.get("method", "srft")]
    return Config(**{**method.flags, **preset, **given})


def settings(cfg):
    """All flags but --resume, as a dictionary: what config.json and every checkpoint hold."""
    return dataclasses.asdict(dataclasses.replace(cfg, resume=False))


def papers_settings(method):
    """The settings of the paper's run of a method."""
    return settings(Config(method=method, **METHODS[method].flags))


def sequences_per_prompt(cfg):
    """(rollouts, demonstrations) of a prompt: (8, 1) by Eq. 6, (7, 1) if the demonstration replaces a
    rollout, (0, 1) for SFT, (8, 0) for GRPO."""
    method = METHODS[cfg.method]
    demos = 1 if method.demos in ("group", "beside") else 0
    if not method.rollouts:
        return 0, demos
    if method.demos == "group" and cfg.demo_in_group == "replaces":
        return cfg.n_rollouts - 1, demos
    return cfg.n_rollouts, demos


def keeps_own_rope(cfg):
    """Does a model whose RoPE is not what App. B changes keep its own? At the default; another theta that is
    asked for it would be wrong to ignore."""
    return cfg.rope_theta == Config.rope_theta


def recomputed_blocks(cfg, blocks):
    """How many of the model's decoder blocks --recompute means."""
    if cfg.recompute == "none":
        return 0
    if cfg.recompute == "all":
        return blocks
    return min(blocks, int(cfg.recompute))


def asks_for_the_papers_loss(cfg):
    """Do the flags ask for srft.srft_loss and nothing else?"""
    return cfg.method == "srft" and all(getattr(cfg, name) == getattr(Config, name) for name in READINGS)


def check_config(cfg, world, window):
    """Refuse impossible combinations at the start, each with its fix. Raises ValueError.

    world: number of ranks; window: the longest sequence, in tokens, that the model takes.
    """
    check_flags(cfg)
    check_lengths(cfg, window)
    check_step(cfg, world)
    check_objective(cfg)


def check_flags(cfg):
    """Of each flag by itself: what can be said before anything is fetched or loaded."""
    for f in dataclasses.fields(cfg):
        if f.metadata["within"]:
            check_interval(f"--{f.name}", getattr(cfg, f.name), f.metadata["within"])
    if cfg.recompute not in ("all", "none") and not cfg.recompute.isdecimal():
        raise ValueError(f"--recompute {cfg.recompute}: must be all, none, or a number of decoder blocks")
    for name in ("model", "data", "out"):
        if not getattr(cfg, name).strip():        # to Python, the folder that the program is started in
            raise ValueError(f"--{name} is empty: give it a name (was a variable of the shell not set?)")
    if cfg.reward:
        custom.read(cfg.reward)                # is it there, and Python?
    if not cfg.out.isprintable():             # a byte that is no UTF-8: the export, at the end, would fail
        raise ValueError(f"--out {cfg.out!r}: has characters that are no text; use another name")


def check_lengths(cfg, window):
    """Of a sequence: it must fit the model and a micro-batch."""
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if longest > window:
        raise ValueError(
            f"--max_prompt_tokens + --max_response_tokens is {longest}, over the window of {window} tokens: "
            "lower them, or raise --window (and --rope_theta)")
    if longest > cfg.micro_batch_tokens:
        raise ValueError(
            f"a sequence may have {longest} tokens (--max_prompt_tokens + --max_response_tokens), over "
            f"--micro_batch_tokens {cfg.micro_batch_tokens}: raise that to at least {longest}")


def check_step(cfg, world):
    """Of a step: every rank and every update must have something to do."""
    if cfg.prompts_per_step < world:
        raise ValueError(f"--prompts_per_step {cfg.prompts_per_step} leaves some of {world} ranks without "
                         "work: raise it, or start fewer ranks")
    if cfg.demo_in_group == "replaces" and cfg.n_rollouts < 3:
        raise ValueError("--n_rollouts must be at least 3 where a demonstration replaces one: a prompt "
                         "without demonstration has but the others, and needs two (Eq. 2)")
    method = METHODS[cfg.method]
    if method.rollouts and method.demos != "group" and cfg.n_rollouts < 2:
        raise ValueError(f"--n_rollouts 1: alone in its group, a rollout of --method {cfg.method} has no "
                         "advantage (Eq. 2); sample at least 2")
    if cfg.updates_per_rollout > cfg.prompts_per_step:
        raise ValueError("--updates_per_rollout must lie between 1 and --prompts_per_step")
    if cfg.profile > cfg.steps:
        raise ValueError("--profile must be one of the --steps, or 0 for none")


def check_objective(cfg):
    """Of flags that need each other, exclude each other, or have no part in the method."""
    if 0 < cfg.tis_cap < 1:
        raise ValueError("--tis_cap must be 0 (no weights) or at least 1")
    if cfg.terms != "all" and not set(cfg.terms.split(",")) <= set(TERMS):
        raise ValueError(f"--terms {cfg.terms}: separate by commas some of {', '.join(TERMS)}; or say all")
    if cfg.reference and not cfg.kl_coef:
        raise ValueError("--reference needs --kl_coef: without, there is no KL to it")
    if cfg.lr_schedule == "constant" and cfg.warmup != Config.warmup:
        raise ValueError("--warmup needs --lr_schedule linear")
    if cfg.entropy_floor and cfg.entropy_quantile:
        raise ValueError("--entropy_floor or --entropy_quantile, not both")
    if cfg.reward and not (cfg.strict_box and cfg.strict_answer):
        raise ValueError("--strict_box and --strict_answer have no part in --reward: leave them out")
    if cfg.method == "sft_kl" and not cfg.kl_coef:
        raise ValueError("--method sft_kl needs --kl_coef; without KL it is --method sft")
    method = METHODS[cfg.method]
    resumed = " (the method of a run that is resumed cannot change)" if cfg.resume else ""
    for name in sorted(FLAGS_OF_METHODS):
        meant = name in method.heeds
        untouched = getattr(cfg, name) in (getattr(Config, name), method.flags.get(name))
        if not meant and not untouched:
            raise ValueError(f"--{name} has no part in --method {cfg.method}: leave it out{resumed}")
