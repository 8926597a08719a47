"""Qwen2.5-VL of any size: asks about a video and keeps where the answer looks.

`Vlm.answer` generates greedily. A probe inside the attention keeps, of each token as it is generated, its
attention onto the video tokens, one row per layer, heads reduced at once; so no L x L matrix is ever made,
and no second pass is needed. The vision tower and the part of the prompt up to the end of the video run once
per clip; every question starts from a copy of their keys and values.

Qwen2.5-VL: arXiv 2502.13923. Video tokens are a grid (T', H', W') of cells of 2 frames and 28 x 28 pixels, in
row-major order t, h, w. Tested with transformers 5.23; torchvision is not needed.

B clips, R rows: one for each (clip, question), L keys, S longest rest of a prompt, n layers probed,
N = T' H' W' video tokens, D width.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import read_json

PATCH, MERGE, PAIR = 14, 2, 2  # pixels a side of a patch, patches a side of a cell, frames of a cell
CELL = PATCH * MERGE
MEAN = np.float32((0.48145466, 0.4578275, 0.40821073))  # of the CLIP image encoder
STD = np.float32((0.26862954, 0.26130258, 0.27577711))
HEADS = ("mean", "max")
ROWS = ("generated", "predicting", "last_prompt")
TOKENS = ("content", "all")
_ARTICLES_AND_VERBS = "a an the this that these those there here it its is are was were be been being can"
_PREPOSITIONS = "as at by for from in into of off on onto out over to up with"
_CONJUNCTIONS = "and or but so if then than which who what where when while how also"
STOP_WORDS = frozenset(f"{_ARTICLES_AND_VERBS} {_PREPOSITIONS} {_CONJUNCTIONS}".split())
_PROBE = "prophy_probe"  # name of our attention function
_FILES = (".safetensors", ".json", ".jinja", ".txt")  # suffixes of the files of a model
PATTERNS = tuple(f"*{suffix}" for suffix in _FILES)
_END = 1 << 20  # bytes of a file that tell it from another of its size


class Reading(NamedTuple):
    """Which attention makes a map.

    Attributes:
        layers: indices of the layers of the language model.
        heads: "mean" or "max" over the heads.
        rows: queries averaged over: "generated" the tokens of the answer; "predicting" the tokens before
            them, from which they were predicted; "last_prompt" the last token of the prompt alone, and
            nothing is generated.
        tokens: "content" leaves out tokens of the answer that are in STOP_WORDS or have no letter or digit,
            unless nothing remains; "all".
        max_new_tokens: length of the longest answer.
    """

    layers: tuple[int, ...]
    heads: str = "mean"
    rows: str = "generated"
    tokens: str = "content"
    max_new_tokens: int = 64


class Answer(NamedTuple):
    """The text, and maps (n, T', H', W') float32: of each layer, the attention that each video token gets."""

    text: str
    maps: np.ndarray


# --- Video in --------------------------------------------------------------------------------------


def resize(frames: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """uint8 (F, H, W, 3) -> (F, 28 H', 28 W', 3) for (H', W') cells, by Pillow's bicubic filter."""
    size = (cells[1] * CELL, cells[0] * CELL)
    resized = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
    return np.stack(resized)


def patchify(frames: np.ndarray) -> np.ndarray:
    """uint8 (2 T', 28 H', 28 W', 3) -> (4 T' H' W', 1176) float32 patches, normalised, cell by cell."""
    count, height, width, _ = frames.shape
    pixels = (frames.astype(np.float32) / 255 - MEAN) / STD
    pixels = pixels.reshape(count // PAIR, PAIR, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    patches = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (T', H', W', MERGE, MERGE, 3, PAIR, PATCH, PATCH)
    return patches.reshape(-1, 3 * PAIR * PATCH * PATCH)


# --- Attention out ---------------------------------------------------------------------------------


class _Probe:
    """Attention of the last query of each row onto `columns`, in the layers wanted."""

    def __init__(self, reading: Reading, columns: slice) -> None:
        self.layers = reading.layers
        self.heads = reading.heads
        self.columns = columns
        self.maps: dict[int, Tensor] = {}  # layer -> (R, N) float32

    def record(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """query (R, heads, S, D), key (R, groups, L, D), mask None or (R, 1, S, L) bool, True where seen."""
        rows, heads, _, width = query.shape
        groups = key.shape[1]
        last = query[:, :, -1].float().reshape(rows, groups, heads // groups, width)
        scores = last @ key.float().transpose(2, 3) * scaling  # (R, groups, heads / groups, L)
        if mask is not None:  # without one, the last query sees every key
            scores = scores.masked_fill(~mask[:, :, -1:], float("-inf"))
        weights = scores.softmax(-1)[..., self.columns].flatten(1, 2)  # (R, heads, N)
        self.maps[layer] = weights.mean(1) if self.heads == "mean" else weights.amax(1)

    def attention(self) -> Tensor:
        """(n, R, N) of the last forward pass."""
        device = self.maps[self.layers[0]].device
        return torch.stack([self.maps[layer].to(device) for layer in self.layers])


def _attend(module, query, key, value, attention_mask, scaling=None, probe: _Probe | None = None, **kwargs):
    if probe is not None and module.layer_idx in probe.layers:
        probe.record(module.layer_idx, query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


transformers.AttentionInterface.register(_PROBE, _attend)
AttentionMaskInterface.register(_PROBE, sdpa_mask)  # without it, the model would drop the padding mask


class Vlm:
    """A model, its tokenizer and its way to write a prompt; see `load`.

    Attributes:
        num_layers: of the language model.
    """

    def __init__(self, model, tokenizer, template: str | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._video = model.config.video_token_id
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._ends = (ends | {tokenizer.eos_token_id}) - {None}
        self._content: dict[int, bool] = {}
        self.num_layers = model.config.text_config.num_hidden_layers

    def time_step(self, seconds: float) -> float:
        """By how much the temporal position of a video token grows from cell to cell, `seconds` apart."""
        return self._model.config.vision_config.tokens_per_second * seconds

    @torch.inference_mode()
    def answer(
        self,
        clips: Sequence[np.ndarray],
        questions: Sequence[Sequence[str]],
        seconds: float,
        reading: Reading,
    ) -> list[list[Answer]]:
        """Puts its questions to each clip.

        Args:
            clips: uint8 (2 T', 28 H', 28 W', 3), all of one shape.
            questions: of each clip.
            seconds: between temporal cells.
            reading: which attention makes a map.
        """
        count, height, width, _ = clips[0].shape
        grid = (count // PAIR, height // CELL, width // CELL)
        clip_of_row = [clip for clip, own in enumerate(questions) for _ in own]
        prompts = [self._prompt(question) for own in questions for question in own]

        # 1. What all questions to a clip share: the prompt up to the end of the video.
        before = prompts[0][0]
        columns = slice(len(before), len(before) + int(np.prod(grid)))
        positions = [self._positions(*prompt, grid, seconds) for prompt in prompts]  # (3, length) each
        cache = transformers.DynamicCache(config=self._model.config.text_config)
        prefix = self._embed([before] * len(clips), self._encode(clips, grid))  # (B, columns.stop, D)
        shared = positions[0][:, None, : columns.stop].expand(-1, len(clips), -1)  # (3, B, columns.stop)
        self._forward(prefix, shared, None, cache, None)
        cache.reorder_cache(torch.tensor(clip_of_row))

        # 2. The rest of each prompt, with padding between the video and the shorter rests.
        rests = [prompt[1] for prompt in prompts]
        longest = max(map(len, rests))
        ids = torch.tensor([[0] * (longest - len(rest)) + rest for rest in rests])  # (R, S)
        place = torch.zeros(3, *ids.shape, dtype=torch.long)
        mask = torch.ones(len(rests), columns.stop + longest, dtype=torch.long)  # (R, L)
        for row, rest in enumerate(rests):
            place[:, row, longest - len(rest) :] = positions[row][:, columns.stop :]
            mask[row, columns.stop : columns.stop + longest - len(rest)] = 0
        probe = _Probe(reading, columns)
        logits = self._forward(self._embed(ids), place, mask, cache, probe)
        of_prompt = attention = probe.attention()  # (n, R, N)

        # 3. The answers, token by token, until every row has ended.
        tokens: list[list[int]] = [[] for _ in rests]
        total = attention.new_zeros(2, *attention.shape)  # over all tokens, and over content tokens
        counted = attention.new_zeros(2, len(rests))
        active = [True] * len(rests)
        steps = 0 if reading.rows == "last_prompt" else reading.max_new_tokens
        for _ in range(steps):
            new = logits.argmax(-1)  # (R,)
            for row, token in enumerate(new.tolist()):
                active[row] = active[row] and token not in self._ends
                if active[row]:
                    tokens[row].append(token)
            if not any(active):
                break
            content = [on and self._is_content(own[-1]) for on, own in zip(active, tokens, strict=True)]
            weight = attention.new_tensor([active, content])  # (2, R)
            if reading.rows == "predicting":
                total += weight[:, None, :, None] * attention
            place = place[:, :, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rests), 1)], 1)
            logits = self._forward(self._embed(new[:, None]), place, mask, cache, probe)
            attention = probe.attention()
            if reading.rows == "generated":
                total += weight[:, None, :, None] * attention
            counted += weight

        # 4. Means over the tokens that count; an empty answer has its prompt's last token alone.
        mean = of_prompt
        for kind in range(2 if reading.tokens == "content" else 1):
            some = counted[kind, None, :, None] > 0
            mean = torch.where(some, total[kind] / counted[kind, None, :, None].clamp(min=1), mean)
        maps = (
            mean.transpose(0, 1).reshape(len(rests), -1, *grid).cpu().numpy()
        )  # (n, R, N) -> (R, n, T', H', W')
        answers: list[list[Answer]] = [[] for _ in clips]
        for row, clip in enumerate(clip_of_row):
            answers[clip].append(Answer(self._tokenizer.decode(tokens[row]).strip(), maps[row]))
        return answers

    @torch.inference_mode()
    def prefer(self, questions: Sequence[str], one: str, other: str) -> np.ndarray:
        """(R,) float32: for each question, without a video, the logit of `one` less that of `other`.

        Of words of several tokens, that of the first one.
        """
        rows = [self._message([{"type": "text", "text": question}]) for question in questions]
        longest = max(map(len, rows))
        ids = [row + [0] * (longest - len(row)) for row in rows]  # attention is causal: no mask is needed
        output = self._model.model.language_model(
            inputs_embeds=self._embed(ids),
            position_ids=torch.arange(longest, device=self._model.device).expand(3, len(rows), -1),
            use_cache=False,
        )
        hidden = output.last_hidden_state  # (R, longest, D)
        last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
        logits = self._model.lm_head(hidden[torch.arange(len(rows), device=hidden.device), last]).float()
        first, second = (
            self._tokenizer(word, add_special_tokens=False).input_ids[0] for word in (one, other)
        )
        return (logits[:, first] - logits[:, second]).cpu().numpy()

    def memory(self, grid: Sequence[int], clips: int, rows: int, new_tokens: int) -> dict[str, int]:
        """Estimated bytes for `clips` at once with `rows` questions each: weights, cache, peak."""
        text = self._model.config.text_config
        weights = sum(value.numel() * value.element_size() for value in self._model.parameters())
        size = self._model.dtype.itemsize
        length = int(np.prod(grid)) + 128 + new_tokens
        head = text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * size
        cache = clips * rows * length * per_token
        # Beside it: the widest layer of the language model over all tokens of the clips, and their pixels.
        widest = clips * length * (3 * text.intermediate_size + 6 * text.hidden_size) * size
        pixels = clips * int(np.prod(grid)) * MERGE**2 * 3 * PAIR * PATCH**2 * (4 + size)
        return {"weights": weights, "cache": cache, "peak": weights + cache + max(widest, pixels)}

    def check_template(self) -> None:
        """Raises UserError where the model's chat template leaves no place for a video."""
        self._prompt("")

    def _prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the place of the video."""
        ids = self._message([{"type": "video"}, {"type": "text", "text": question}])
        if ids.count(self._video) != 1:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} gives {ids.count(self._video)} video "
                "tokens for one video: give the folder of a Qwen2.5-VL model as it was published"
            )
        at = ids.index(self._video)
        return ids[:at], ids[at + 1 :]

    def _message(self, content: list[dict[str, str]]) -> list[int]:
        """Token ids of one message, up to where its answer begins."""
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                chat_template=self._template,
            )
        except Exception as error:  # a template is a program, and may do anything
            reason = " ".join(str(error).split())
            where = self._tokenizer.name_or_path
            raise UserError(
                f"the chat template of {where} does not run ({reason}): download it again"
            ) from error
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _positions(self, before: list[int], after: list[int], grid, seconds: float) -> Tensor:
        """(3, length) temporal, row and column positions of a whole prompt."""
        ids = torch.tensor([before + [self._video] * int(np.prod(grid)) + after])
        positions, _ = self._model.model.get_rope_index(
            ids,
            mm_token_type_ids=2 * (ids == self._video).int(),  # 2 is video
            video_grid_thw=torch.tensor([[grid[0], grid[1] * MERGE, grid[2] * MERGE]]),
            second_per_grid_ts=[seconds],
        )
        return positions[:, 0]

    def _encode(self, clips: Sequence[np.ndarray], grid: tuple[int, int, int]) -> Tensor:
        """(B, N, D) features of the video tokens."""
        patches = torch.from_numpy(np.concatenate([patchify(frames) for frames in clips]))
        thw = torch.tensor([[grid[0], grid[1] * MERGE, grid[2] * MERGE]] * len(clips))
        device = self._model.device
        features = self._model.get_video_features(patches.to(device), thw.to(device), return_dict=True)
        return torch.stack(list(features.pooler_output))

    def _embed(self, ids, video: Tensor | None = None) -> Tensor:
        """(rows, length, D) of ids (rows, length), followed by the video's features where given."""
        ids = torch.as_tensor(ids, device=self._model.device)
        embedded = self._model.get_input_embeddings()(ids)
        return embedded if video is None else torch.cat([embedded, video.to(embedded)], 1)

    def _forward(self, embedded: Tensor, place: Tensor, mask: Tensor | None, cache, probe) -> Tensor:
        """Logits (rows, vocabulary) after the last token; extends the cache."""
        device = self._model.device
        output = self._model.model.language_model(
            inputs_embeds=embedded,
            position_ids=place.to(device),
            attention_mask=None if mask is None else mask.to(device),
            past_key_values=cache,
            use_cache=True,
            probe=probe,
        )
        return self._model.lm_head(output.last_hidden_state[:, -1])

    def _is_content(self, token: int) -> bool:
        if token not in self._content:
            word = self._tokenizer.decode([token], skip_special_tokens=True).strip().lower()
            self._content[token] = any(map(str.isalnum, word)) and word not in STOP_WORDS
        return self._content[token]


# --- The model on disk -----------------------------------------------------------------------------


def load(path: str | os.PathLike, device: str, dtype: str) -> Vlm:
    """Opens a local folder as published: config, weights in safetensors, tokenizer with chat template.

    Args:
        path: the folder.
        device: such as "cpu" or "cuda"; "auto" spreads the layers over the GPUs there are (needs accelerate).
        dtype: "bfloat16", "float16" or "float32".

    Raises:
        UserError: no such folder, of another kind of model, or incomplete.
    """
    folder = Path(path)
    config = _read_config(folder)
    vision = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": PAIR}
    for key, value in vision.items():
        found = config.get("vision_config", {}).get(key, value)
        if found != value:
            raise UserError(
                f"{folder / 'config.json'}: {key} is {found}, Qwen2.5-VL has {value}: give such a model"
            )
    transformers.logging.set_verbosity_error()  # it warns of what is no fault of the user
    transformers.logging.disable_progress_bar()
    try:
        model, found = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            device_map=device,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} cannot be opened ({reason}); download the whole model again") from error
    if found["missing_keys"]:  # transformers would use random weights
        first = sorted(found["missing_keys"])[0]
        raise UserError(f"{folder} lacks weights, first {first}; download the whole model again")
    if tokenizer.convert_tokens_to_ids("<|video_pad|>") != model.config.video_token_id:
        raise UserError(f"the tokenizer in {folder} has no <|video_pad|> of this model; download it again")
    template = tokenizer.chat_template
    legacy = folder / "chat_template.json"  # where the processors of older versions keep it
    if legacy.exists():
        template = read_json(legacy, "download it again")["chat_template"]
    if not template:
        raise UserError(
            f"{folder} has no chat template (chat_template.json or .jinja); download the whole model again"
        )
    model.set_attn_implementation({"": _PROBE, "text_config": _PROBE, "vision_config": "sdpa"})
    return Vlm(model.eval(), tokenizer, template)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"--vlm: {folder} {what}; give the folder of a Qwen2.5-VL model, downloaded beforehand"
        )
    parts = {key: dict for key in ("vision_config", "text_config")}
    config = read_json(path, "download the model again", parts)
    kind = config.get("model_type")
    if kind != "qwen2_5_vl":
        raise UserError(f"--vlm: {folder} holds a model of type {kind}; give a Qwen2.5-VL model (qwen2_5_vl)")
    return config


def describe(path: str | os.PathLike) -> dict[str, str]:
    """Its folder's name, and a hash of the names, sizes and ends of its files, which tells models apart.

    To read all weights would take minutes. Raises UserError as `load` does for a missing or other folder.
    """
    folder = Path(path)
    _read_config(folder)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _FILES:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                for begin in (0, max(0, size - _END)):
                    opened.seek(begin)
                    digest.update(opened.read(_END))
    return {"name": folder.resolve().name, "sha256": digest.hexdigest()}


def choose(folder: Path, whole: bool) -> list[Path]:
    """The files of a model, as `prophy_jax.run.hub` asks for them. UserError on another kind of model."""
    config = folder / "config.json"
    if config.is_file() and not config.stat().st_size:
        return [config]
    _read_config(folder)
    files = [path for path in folder.iterdir() if path.suffix in _FILES]
    index = folder / "model.safetensors.index.json"
    weights = [path for path in files if path.suffix == ".safetensors"]
    if index.is_file() and index.stat().st_size:
        weights = [
            folder / name
            for name in set(read_json(index, "download it again").get("weight_map", {}).values())
        ]
    elif not weights and not whole:
        weights = [folder / "model.safetensors"]
    return [path for path in files if path.suffix != ".safetensors"] + weights


def choose_device(folder: str | os.PathLike, process: int) -> str:
    """GPU number `process`, cyclically; "auto", all of them, for a model larger than one; or "cpu"."""
    count = torch.cuda.device_count()
    if not count:
        return "cpu"
    device = process % count
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    fits = size < 0.9 * torch.cuda.get_device_properties(device).total_memory
    return f"cuda:{device}" if fits or count == 1 else "auto"
