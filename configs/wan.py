"""ProPhy on Wan2.1-T2V-1.3B (ProPhy, CVPR 2026, Table 1: VideoPhy2 PC 65.0, SA 32.0, Joint 26.5).

    configs/wan.py                  the paper's run: 480x832, 81 frames, K=10, 20K clips of WISA-80K
    configs/wan.py:14b              Wan2.1-T2V-14B, to sample with; training on it has not been tried
    configs/wan.py:tiny             seconds: the same path end to end on a small model; CI runs it
    configs/wan.py:demo_backbone    minutes: pretrains the demo's small backbone on the physics sandbox
    configs/wan.py:demo             minutes: trains the branch on that backbone (`make demo`)
    configs/wan.py:demo_data        minutes: real clips, random weights, every stage (`make demo-data`)

Every command prints all keys and what they mean with --print_config.

An arm of the paper's ablation follows a comma, such as configs/wan.py:demo,pb+seb:
    full                            the whole branch, as without a comma
    pb, pb+seb, pb+reb              the branch without the other expert blocks and their losses
    lora                            adapters of the backbone's attention in place of the branch
    lora+seb, lora+reb              adapters, and one expert block without physical blocks
    full+lora                       the whole branch and adapters: the paper leaves open whether it has them
    finetune                        the whole backbone in place of the branch, or what patterns name of it
    bce                             absolute instead of relative semantic alignment
    absolute                        token alignment everywhere in the categories present, no balance

Hardware of the paper's run: not stated by the paper. Ours: one 80 GB GPU holds it, one clip of the
8 at a time, in 30 GB by the planner's count; no time is measured yet.
"""

import difflib
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from prophy_jax.run.errors import UserError

PROPHY_LOSSES = dict(relative=0.1, alignment=0.02, balance=0.01)
# The one of the Wan2.1 reference code.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
PUBLIC = ("", "14b")  # variants of public weights
# (pattern of parameter paths, name of its learning rate); the first match counts.
GROUPS = (("branch/blocks/", "blocks"), ("branch/", "branch"), ("backbone/", "backbone"))


def get_config(arg: str = "") -> ConfigDict:
    variants = {
        "": paper,
        "14b": large,
        "tiny": tiny,
        "demo_backbone": demo_backbone,
        "demo": demo,
        "demo_data": demo_data,
    }
    return choose("configs/wan.py", variants, arg)


def choose(file: str, variants: Mapping[str, Callable[[], ConfigDict]], arg: str) -> ConfigDict:
    """The configuration that "variant" or "variant,arm" names, of a file."""
    variant, _, arm = arg.partition(",")
    if variant not in variants:
        raise UserError(f"{file} has no variant {variant!r}; it has {sorted(filter(None, variants))}")
    config = variants[variant]()
    arms = {
        "": (),
        "full": (),
        "pb": (without_semantic, without_refinement),
        "pb+seb": (without_refinement,),
        "pb+reb": (without_semantic,),
        "lora": (with_lora, without_branch),
        "lora+seb": (with_lora, without_copies, without_refinement, without_exits),
        "lora+reb": (with_lora, without_copies, without_semantic),
        "full+lora": (with_lora,),
        "finetune": (without_branch, with_trained_backbone),
        "bce": (bce,),
        "absolute": (absolute_alignment,),
    }
    if arm not in arms:
        close = difflib.get_close_matches(arm, [name for name in arms if name], 1)
        guess = f"; did you mean {variant},{close[0]}?" if close else ""
        raise UserError(f"{file} has no arm {arm!r}; it has {sorted(filter(None, arms))}{guess}")
    if arm and "branch" not in config.parts:
        raise UserError(f"{file}:{variant} trains no branch: it has no arms such as {arm!r}")
    for change in arms[arm]:
        change(config)
    return config


# --- Runs ------------------------------------------------------------------------------------------


def paper() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 20_000
    config.batch_size = 8
    config.accumulation = 8  # one clip at a time: what fits one 80 GB GPU. On n devices, 8 / n.

    config.backbone = dict(module="wan", variant="1.3b", dtype="bfloat16", remat="self_attention")
    config.backbone_params = "checkpoints/wan2.1-t2v-1.3b/transformer"
    config.codec_params = "checkpoints/wan2.1-t2v-1.3b/vae"
    config.text_encoder_params = "checkpoints/wan2.1-t2v-1.3b/text_encoder"
    config.backbone_remedy = (
        "convert the public weights: python -m convert.wan --src=Wan-AI/Wan2.1-T2V-1.3B "
        "--dst=checkpoints/wan2.1-t2v-1.3b"
    )
    config.frozen_dtype = "bfloat16"
    # What is trained next to the backbone: name -> a file of prophy_jax/models/beside and its arguments.
    config.parts = dict(
        branch=dict(
            module="prophy",
            layers=tuple(range(0, 30, 3)),
            semantic=dict(basis_grid=(21, 60, 104), basis_space="latent", experts=17, hidden=512),
            refinement=dict(experts=8, top_k=2, align_hidden=64),
        )
    )

    config.objective = dict(module="flow", distribution="logit_normal", shift=3.0)
    config.losses = dict(PROPHY_LOSSES)
    config.reduction = dict(relative="sum", alignment="mean")
    config.caption_dropout = 0.1
    config.optimizer = dict(
        groups=GROUPS,
        learning_rates=dict(blocks=2e-5, branch=1e-4, backbone=0.0),  # 0: frozen
        warmup=200,
        decay="constant",
        clip=1.0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=1e-4,
        ema=0.999,
    )

    config.data = dict(
        dir="data/wisa-80k-480p",
        # Further data sets of the same clips, by name. "alignment": token labels; "" takes those of `dir`.
        side=dict(alignment="data/wisa-80k-480p-labels"),
        # Further (frames, height, width): portrait and square clips of as many pixels. Each clip takes the
        # one of its shape, and the longest that it fills, such as of (49, 480, 832). Batches are of one of
        # them.
        buckets=((81, 832, 480), (81, 624, 624)),
        max_upscale=1.25,
        categories="answers",
        taxonomy="",
        subset=20_000,
        weights=(),
        seed=0,
        val_share=0.01,
        shard=64,
        height=480,
        width=832,
        frames=81,
        fps=16,
    )
    # What a vision-language model says is where; see prophy_jax.labels. The paper leaves all of it open.
    config.label = dict(
        layers=(0.5, 0.85),
        heads="mean",
        rows="generated",
        tokens="content",
        denoise="difference",
        scale="max",
        max_new_tokens=64,
        every=1,
        cell=2,
        batch=1,
        dtype="bfloat16",
    )
    config.label_check = dict(clips=24, size=128, frames=13, fps=8, seed=0)
    config.codec = dict(module="wan_vae", dtype="float32", tile=placeholder(tuple))
    config.text_encoder = dict(module="t5", variant="umt5-xxl", dtype="bfloat16", length=512)

    config.mesh = dict(data=-1, fsdp=1, context=1)
    config.attention = "auto"
    config.log = dict(every=10, wandb="", profile=())
    config.checkpoint = dict(every=500, keep=3)
    config.validation = dict(every=500, batches=4, batch_size=8, times=(0.2, 0.5, 0.8))
    # What scores held-out prompts: name -> a file of prophy_jax/evaluation and its arguments.
    config.evaluators = dict(loss=dict(module="held_out_loss"), motion=dict(module="motion"))
    config.study = dict(prompts=32, seed=0)
    config.samples = dict(
        every=2000,
        clips=4,
        solver="unipc",
        steps=50,
        shift=8.0,
        guidance=6.0,
        guidance_schedule="constant",
        skip=(),
        negative_prompt=NEGATIVE_PROMPT,
    )
    return config


def large() -> ConfigDict:
    """Settings of the Wan2.1 reference code for 14B at 480p; branch copies as sparse as the paper's."""
    config = paper()
    folder = "checkpoints/wan2.1-t2v-14b"
    config.backbone.variant = "14b"
    config.backbone_params = f"{folder}/transformer"
    config.codec_params = f"{folder}/vae"
    config.text_encoder_params = f"{folder}/text_encoder"
    config.backbone_remedy = (
        f"convert the public weights: python -m convert.wan --src=Wan-AI/Wan2.1-T2V-14B --dst={folder}"
    )
    config.parts.branch.layers = tuple(range(0, 40, 4))
    config.samples.update(shift=5.0, guidance=5.0)
    return config


def tiny() -> ConfigDict:
    """Two blocks, 32x32 pixels, 9 frames."""
    config = small("data/tiny", size=32, frames=9)
    config.backbone.update(dim=48, num_heads=2, num_layers=2, ffn_dim=96)
    config.parts.branch = dict(
        module="prophy",
        layers=(0, 1),
        semantic=dict(basis_grid=(3, 8, 8), hidden=32),
        refinement=dict(experts=8, top_k=2),
    )
    config.losses = dict(PROPHY_LOSSES)
    config.steps = 200
    config.batch_size = 4
    config.data.sandbox = dict(train=32, val=8, test=8, seed=0)
    config.optimizer.learning_rates.backbone = 1e-3
    config.optimizer.warmup = 10
    config.checkpoint = dict(every=50, keep=2)
    config.validation = dict(every=100, batches=1, batch_size=2, times=(0.2, 0.5, 0.8))
    config.samples.update(every=200, clips=2, steps=4, shift=3.0, guidance=2.0)
    config.study.prompts = 4
    return config


def demo_backbone() -> ConfigDict:
    """Stands in for Wan2.1's pretraining: a small Wan-shaped backbone learns to draw the sandbox."""
    config = small("data/demo", size=48, frames=13)
    config.backbone.update(dim=128, num_heads=2, num_layers=6, ffn_dim=512)
    config.backbone.text_len = config.text_encoder.length = 52  # the longest caption has 49 words
    config.steps = 2600
    config.batch_size = 16
    config.data.sandbox = dict(train=2000, val=96, test=96, seed=0)
    config.optimizer.groups = GROUPS[2:]
    config.optimizer.learning_rates = dict(backbone=3e-3)
    config.optimizer.warmup = 100
    config.optimizer.decay = "cosine"
    config.optimizer.ema = 0.995
    config.checkpoint = dict(every=250, keep=2)
    config.validation = dict(every=250, batches=4, batch_size=16, times=(0.2, 0.5, 0.8))
    config.samples.update(every=1000, clips=4, steps=20, shift=3.0, guidance=2.0)
    return config


def demo() -> ConfigDict:
    """The branch on the frozen demo backbone, with the paper's losses and coefficients.

    Two CPU cores: backbone 9 minutes, branch 1.5, measuring 0.5. Expected: on test clips a mean AUC of P'_r
    of 0.89 (0.48 before training) and entropies of the mean routing above 0.9; on validation clips a
    diffusion loss of 0.9989 of that of the backbone alone.
    """
    config = demo_backbone()
    config.backbone_params = "runs/demo_backbone/backbone"
    config.parts.branch = dict(
        module="prophy",
        layers=(0, 2, 4),
        semantic=dict(basis_grid=(4, 12, 12), hidden=128),
        refinement=dict(experts=8, top_k=2),
    )
    config.losses = dict(PROPHY_LOSSES)
    config.steps = 300
    # More than the paper's run would take, which has far more steps.
    config.optimizer.groups = (GROUPS[0], ("branch/exits/", "exits"), *GROUPS[1:])
    config.optimizer.learning_rates = dict(blocks=1e-4, exits=1e-4, branch=1e-3, backbone=0.0)
    config.optimizer.warmup = 50
    config.optimizer.ema = 0.99
    config.validation.every = 100
    config.samples.every = 300
    return config


def demo_data() -> ConfigDict:
    """The paper's run on real clips, for 50 steps, with every part real and tiny: the walk of docs/data.md.

    Two CPU cores: 3 minutes in all. Expected: every loss finite and above 0; random weights know nothing.
    """
    config = paper()
    folder = "checkpoints/demo-data"
    config.backbone_params = f"{folder}/transformer"
    config.codec_params = f"{folder}/vae"
    config.text_encoder_params = f"{folder}/text_encoder"
    config.backbone_remedy = (
        f"convert them: python -m convert.wan --src=runs/demo-data/public/Wan2.1 --dst={folder}"
    )
    config.backbone = dict(
        **dict(module="wan", dtype="float32", remat="none"),
        **dict(dim=48, num_heads=3, num_layers=3, ffn_dim=64, text_dim=32, text_len=160),
    )
    config.frozen_dtype = "float32"
    config.codec = dict(module="wan_vae", dtype="float32", base_dim=8)
    config.text_encoder = dict(
        **dict(module="t5", dtype="float32", length=160, vocab_size=256, d_model=32),
        **dict(d_kv=8, d_ff=48, num_layers=2, num_heads=4, shared_bias=False),
    )
    config.parts.branch.layers = (0, 2)
    config.parts.branch.semantic.update(basis_grid=(13, 12, 20), hidden=16)
    # Clips of 5 s of 16:9, of 4 s of 16:10, and of 6 s of 3:2.
    config.data.update(
        **dict(dir="data/demo-data", subset=0, shard=4, val_share=0.1),
        **dict(frames=49, height=96, width=160, buckets=((81, 96, 160), (49, 96, 144))),
    )
    config.data.side.alignment = "data/demo-data-labels"
    config.label.update(dtype="float32", max_new_tokens=16)
    config.steps, config.batch_size, config.accumulation = 50, 4, 1
    config.optimizer.warmup = 5
    config.log.every = 5
    config.checkpoint = dict(every=25, keep=2)
    config.validation.update(every=25, batches=1, batch_size=1)
    config.samples.update(every=50, clips=1, steps=4, shift=3.0, negative_prompt="")
    return config


def small(folder: str, size: int, frames: int) -> ConfigDict:
    """What the small runs share: fp32 on a CPU, the sandbox, and stand-ins for the VAE and the T5."""
    config = paper()
    config.backbone = dict(module="wan", dtype="float32", remat="none", text_dim=64, text_len=64, freq_dim=64)
    config.backbone_params = config.codec_params = config.text_encoder_params = ""
    config.backbone_remedy = "make it: python -m prophy_jax.train --config=configs/wan.py:demo_backbone --workdir=runs/demo_backbone"  # noqa: E501
    config.frozen_dtype = "float32"
    config.accumulation = 1
    config.parts = dict()
    config.losses = dict()
    config.objective = dict(module="flow", distribution="logit_normal", shift=2.0)
    config.data.update(dir=folder, height=size, width=size, frames=frames, fps=8, subset=0, max_upscale=2.0)
    config.data.buckets = ()
    config.data.side.alignment = ""
    config.codec = dict(module="linear_codec")
    config.text_encoder = dict(module="hash_text", dim=64, length=64)
    config.samples.negative_prompt = ""
    return config


# --- Arms of the ablation --------------------------------------------------------------------------


def with_lora(config: ConfigDict) -> None:
    """Rank, alpha and rate as LoRA trainers commonly choose them: the paper states none.

    WISA, of one of the same authors, has rank 128, alpha 16 and 2e-5.
    """
    rank = 64 if "variant" in config.backbone else 8
    config.parts.lora = dict(
        module="lora",
        rank=rank,
        alpha=float(rank),
        targets=("backbone/blocks/.*attn/[qkvo]",),
        rank_stabilized=False,
    )
    config.optimizer.groups = (("lora/", "lora"), *config.optimizer.groups)
    config.optimizer.learning_rates.lora = 1e-4 if "variant" in config.backbone else 1e-3


def with_trained_backbone(config: ConfigDict) -> None:
    """The rate at which trainers of Wan commonly fine-tune all of it; the paper has no such row.

    A part alone: config.optimizer.groups=(("backbone/blocks/.*attn/", "backbone"), ("backbone/", None)).
    """
    config.optimizer.learning_rates.backbone = 1e-5 if "variant" in config.backbone else 1e-4


def without_branch(config: ConfigDict) -> None:
    del config.parts["branch"]
    config.losses = dict()
    without_groups(config, "branch/")


def without_copies(config: ConfigDict) -> None:
    config.parts.branch.copies = False
    without_groups(config, "branch/blocks/")


def without_exits(config: ConfigDict) -> None:
    """Of a branch that adds nothing to the stream."""
    without_groups(config, "branch/exits/")


def without_groups(config: ConfigDict, start: str) -> None:
    """Drops the groups whose patterns begin so, and the learning rates that no other group has."""
    kept = [group for group in config.optimizer.groups if not group[0].startswith(start)]
    names = {name for _, name in kept}
    rates = {name: rate for name, rate in config.optimizer.learning_rates.items() if name in names}
    config.optimizer.groups, config.optimizer.learning_rates = tuple(kept), rates


def without_semantic(config: ConfigDict) -> None:
    config.parts.branch.semantic = None
    del config.losses["relative"]


def without_refinement(config: ConfigDict) -> None:
    config.parts.branch.refinement = None
    del config.losses["alignment"], config.losses["balance"]


def bce(config: ConfigDict) -> None:
    config.losses = {**config.losses, "bce": config.losses.relative}
    del config.losses["relative"]


def absolute_alignment(config: ConfigDict) -> None:
    config.losses = {**config.losses, "absolute_alignment": config.losses.alignment}
    config.reduction = {**config.reduction, "absolute_alignment": config.reduction.alignment}
    del config.losses["alignment"], config.losses["balance"]
