"""ProPhy on CogVideoX (ProPhy, CVPR 2026; the paper's second backbone).

    configs/cogvideox.py                  the paper's run on 5B: 480x720, 49 frames at 8 fps, K=6
    configs/cogvideox.py:2b               CogVideoX-2B, to sample with; training on it has not been tried
    configs/cogvideox.py:1.5-5b           CogVideoX1.5-5B at 768x1360, 81 frames at 16 fps, to sample with
    configs/cogvideox.py:tiny             seconds: the same path end to end on a small model; CI runs it
    configs/cogvideox.py:demo_backbone    minutes: pretrains a small backbone on the physics sandbox
    configs/cogvideox.py:demo             minutes: trains the branch on that backbone

Arms of the ablation follow a comma, as in configs/wan.py.

Hardware of the paper's run: not stated by the paper. Ours: see docs/scaling.md for what it needs; no time is
measured yet.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import wan

PUBLIC = ("", "2b", "1.5-5b")  # variants of public weights


def get_config(arg: str = "") -> ConfigDict:
    variants = {
        "": paper,
        "2b": small_variant,
        "1.5-5b": later_variant,
        "tiny": tiny,
        "demo_backbone": demo_backbone,
        "demo": demo,
    }
    return wan.choose("configs/cogvideox.py", variants, arg)


# --- Runs ------------------------------------------------------------------------------------------


def paper() -> ConfigDict:
    config = wan.paper()
    public(config, "cogvideox-5b", "CogVideoX-5b")
    config.backbone = dict(module="cogvideox", variant="5b", dtype="bfloat16", remat="self_attention")
    config.codec = dict(
        module="cogvideox_vae",
        dtype="float32",
        tile=placeholder(tuple),
        encode_whole=False,
        scaling_factor=0.7,
    )
    config.text_encoder = dict(
        module="t5", variant="t5-v1.1-xxl", dtype="bfloat16", length=226, padding="encoded"
    )
    config.parts.branch.layers = tuple(range(0, 42, 7))
    config.parts.branch.semantic.basis_grid = (13, 60, 90)
    config.objective = dict(module="v_prediction", snr_shift=1.0)
    config.data.update(dir="data/wisa-80k-480x720")
    config.data.side.alignment = "data/wisa-80k-480x720-labels"
    config.data.update(frames=49, height=480, width=720, fps=8)
    # The model takes no other height and width. 5 s: a clip of the length that Wan takes is not 6 s long.
    config.data.buckets = ((41, 480, 720),)
    config.samples.update(solver="cogvideox-dpm", guidance=6.0, guidance_schedule="dynamic")
    config.samples.shift = placeholder(float)  # that of the objective
    config.samples.negative_prompt = ""
    return config


def small_variant() -> ConfigDict:
    """Settings of the model card of CogVideoX-2B; branch copies as sparse as the paper's."""
    config = paper()
    public(config, "cogvideox-2b", "CogVideoX-2b")
    config.backbone.variant, config.codec.scaling_factor = "2b", 1.15258426
    config.parts.branch.layers = tuple(range(0, 30, 5))
    config.objective.snr_shift = 3.0
    config.samples.update(solver="ddim", guidance_schedule="constant")
    return config


def later_variant() -> ConfigDict:
    """Settings of the model card of CogVideoX1.5-5B. Its patches are two latent frames long."""
    config = paper()
    public(config, "cogvideox1.5-5b", "CogVideoX1.5-5B")
    config.backbone.variant = "1.5-5b"
    config.codec.lead = 1  # which makes 21 latents 22
    config.parts.branch.semantic.basis_grid = (22, 96, 170)
    config.data.update(dir="data/wisa-80k-768x1360")
    config.data.side.alignment = "data/wisa-80k-768x1360-labels"
    config.data.update(frames=81, height=768, width=1360, fps=16, buckets=())
    return config


def public(config: ConfigDict, folder: str, download: str) -> None:
    """The places of converted public weights."""
    folder = f"checkpoints/{folder}"
    config.backbone_params = f"{folder}/transformer"
    config.codec_params = f"{folder}/vae"
    config.text_encoder_params = f"{folder}/text_encoder"
    config.backbone_remedy = (
        f"convert the public weights: python -m convert.cogvideox --src=zai-org/{download} --dst={folder}"
    )


def tiny() -> ConfigDict:
    """Two blocks, 32x32 pixels, 9 frames."""
    config = on_the_sandbox(wan.tiny())
    config.backbone.num_heads = 3  # of width 16, the least that three axes of positions divide
    return config


def demo_backbone() -> ConfigDict:
    """Stands in for CogVideoX's pretraining: a small backbone learns to draw the sandbox."""
    return on_the_sandbox(wan.demo_backbone())


def demo() -> ConfigDict:
    """The branch on the frozen demo backbone, with the paper's losses and coefficients.

    Expected: on test clips a mean AUC of P'_r of 0.87 (0.48 before training), on validation clips a diffusion
    loss of 0.9992 of that of the backbone alone; docs/cogvideox.md.
    """
    config = on_the_sandbox(wan.demo())
    config.backbone_params = "runs/demo_cogvideox_backbone/backbone"
    return config


def on_the_sandbox(config: ConfigDict) -> ConfigDict:
    """A small run of configs/wan.py with blocks, objective and sampler of CogVideoX."""
    wan_sizes = config.backbone
    config.backbone = dict(
        **dict(module="cogvideox", dtype="float32", remat="none", text_dim=64, time_dim=64),
        **{key: wan_sizes[key] for key in ("dim", "num_heads", "num_layers", "text_len")},
        ffn_dim=4 * wan_sizes.dim,
        base_grid=(config.data.height // 8, config.data.width // 8),
    )
    config.backbone_remedy = (
        "make it: python -m prophy_jax.train --config=configs/cogvideox.py:demo_backbone "
        "--workdir=runs/demo_cogvideox_backbone"
    )
    config.objective = dict(module="v_prediction", snr_shift=1.0)
    config.samples.solver = "ddim"
    config.samples.shift = placeholder(float)  # that of the objective
    return config
