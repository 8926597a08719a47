"""ProPhy's physical branch in PyTorch, read from `prophy_branch.safetensors` (see docs/pytorch.md).

    transformer = WanTransformer3DModel.from_pretrained("exported/transformer")
    prophy = ProPhy(transformer, "exported/prophy_branch.safetensors")
    velocity, routing = prophy(latents, t, text)

From then on the transformer itself adds the branch's hints, also inside a `diffusers.WanPipeline`;
`prophy.scale` sets their strength. Needs torch, diffusers and safetensors.

B batch, T h w latent grid, N tokens, C model width, L text length, D text width, E experts.
"""

import copy
import json

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


class ProPhy(nn.Module):
    """A Wan2.1 transformer of diffusers with the physical branch beside it."""

    def __init__(self, transformer: nn.Module, path: str, scale: float = 1.0):
        super().__init__()
        with safe_open(path, "pt") as file:
            about = file.metadata()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["names"] != "diffusers":
            raise ValueError(f"{path} has {about['names']} names: export it with --format=diffusers")
        self.config, self.scale = json.loads(about["branch"]), scale
        self.transformer, self.routing = transformer, {}
        device = next(transformer.parameters()).device
        self.blocks = nn.ModuleList(copy.deepcopy(transformer.blocks[i]) for i in self.config["layers"])
        self.blocks.load_state_dict(
            {name.removeprefix("blocks."): w for name, w in weights.items() if name.startswith("blocks.")}
        )
        self.weights = {name: w.to(device) for name, w in weights.items() if not name.startswith("blocks.")}
        self._hints = {}
        transformer.register_forward_pre_hook(self._compute_hints, with_kwargs=True)
        for layer in self.config["layers"]:
            transformer.blocks[layer].register_forward_hook(
                lambda block, inputs, tokens, layer=layer: tokens + self._hints[layer]
            )

    def forward(self, latents, timestep, text):
        """Predicts the velocity of noisy latents.

        Args:
            latents: (B, 16, T, h, w), normalised.
            timestep: (B,) in 0..1000.
            text: (B, L, D) text embeddings, zero after the last valid row.

        Returns:
            velocity (B, 16, T, h, w) and a dict: "semantic" (B, E_s) shares of the physics that the text
            implies; "refinement" (B, N, E_r) shares of the experts of each token; "alignment" (B, N, 17)
            scores of each token for each kind of physics. A part that the branch lacks has no entry.
        """
        inputs = dict(hidden_states=latents, timestep=timestep, encoder_hidden_states=text)
        return self.transformer(**inputs, return_dict=False)[0], self.routing

    def _compute_hints(self, transformer, args, inputs):
        """Before the transformer runs: the branch reads the same inputs, never the backbone's tokens."""
        latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        temb, modulation, context, _ = transformer.condition_embedder(inputs["timestep"], text, None)
        modulation, rope = modulation.unflatten(1, (6, -1)), transformer.rope(latents)
        self.routing = {}
        prior = self._prior(latents, text)
        in_tokens = prior.ndim == 3
        embedded = latents if in_tokens else (latents + prior).to(latents.dtype)
        tokens = transformer.patch_embedding(embedded).flatten(2).transpose(1, 2)  # (B, N, C)
        if in_tokens:
            tokens = tokens + prior.to(tokens.dtype)
        for index, layer in enumerate(self.config["layers"]):
            tokens = self.blocks[index](tokens, context, modulation, rope)
            refined = tokens
            if self.config["refinement"] and layer == self.config["layers"][-1]:
                refined = self._refine(tokens)
            self._hints[layer] = self.scale * self._linear(f"exits.{index}", refined)

    def _prior(self, latents, text):
        """What the text makes likely: (B, 16, T, h, w), (B, N, C) for a basis of tokens, else zeros."""
        if not self.config["semantic"]:
            return torch.zeros_like(latents)
        text = text.float()
        valid = (text != 0).any(-1, keepdim=True).float()  # (B, L, 1)
        pooled = (text * valid).sum(1) / valid.sum(1).clamp(min=1)  # (B, D)
        hidden = F.gelu(self._linear("semantic.router.hidden", pooled), approximate="tanh")
        rho = self._linear("semantic.router.logits", hidden).softmax(-1)
        self.routing["semantic"] = rho
        prior = torch.einsum("be,e...->b...", rho, self.weights["semantic.basis"])
        return prior if prior.ndim == 3 else resize(prior, latents.shape[2:])

    def _refine(self, tokens):
        """The `top_k` likeliest linear experts of each token, weighted by their shares (not renormalised)."""
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)
        rho = self._linear("refinement.router", normed).softmax(-1)  # (B, N, E)
        best, chosen = rho.topk(self.config["refinement"]["top_k"])
        shares = torch.zeros_like(rho).scatter(-1, chosen, best).to(tokens.dtype)
        hidden = F.gelu(self._linear("refinement.align_hidden", rho), approximate="tanh")
        self.routing |= {"refinement": rho, "alignment": self._linear("refinement.align", hidden)}
        experts = zip(
            self.weights["refinement.experts.weight"].to(tokens.dtype),  # (E, C, C)
            self.weights["refinement.experts.bias"].to(tokens.dtype),  # (E, C)
            shares.unbind(-1),
            strict=True,
        )
        return sum(F.linear(tokens, weight, bias) * share[..., None] for weight, bias, share in experts)

    def _linear(self, name, x):
        return F.linear(x, *(self.weights[f"{name}.{part}"].to(x.dtype) for part in ("weight", "bias")))


def resize(x, size):
    """Trilinear resize of (B, C, T, h, w) to `size`, half-pixel centres, smoothed where it shrinks.

    That is `jax.image.resize(..., "linear")`; `F.interpolate` would not smooth.
    """
    for axis, (old, new) in enumerate(zip(x.shape[2:], size, strict=True), start=2):
        centres = (torch.arange(new, device=x.device) + 0.5) * old / new - 0.5
        distance = (centres[:, None] - torch.arange(old, device=x.device)).abs()  # (new, old)
        weights = (1 - distance / max(old / new, 1)).clamp(min=0)
        weights = weights / weights.sum(1, keepdim=True)
        x = (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return x
