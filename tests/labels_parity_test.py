"""Recorded attention against slices of the full matrices of transformers' eager attention, random weights."""

import itertools

import numpy as np
import pytest

from tests.late import late
from tests.tiny_vlm import save_tiny_vlm

torch = late("torch")
transformers = late("transformers")
vlm = late("prophy_jax.labels.vlm", needs="torch")

# (T', H', W'): like 21 x 15 x 26 (Wan) and 13 x 15 x 23 (CogVideoX), smaller; the second is of odd width.
GRIDS = ((5, 4, 6), (3, 3, 5))
# Of different lengths, several to a clip and one to another, as categories come.
QUESTIONS = (
    ("Describe where the other thing is in the air.", "Where?"),
    ("The rather long question, in another tone, on another thing: where is the thing?",),
)
SECONDS = 0.5
TOLERANCE = 1e-5  # of weights up to 1: float32 sums of a few hundred products in another order


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm")
    save_tiny_vlm(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return vlm.load(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def reference(folder):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def clips_of(grid, seed=0):
    shape = (len(QUESTIONS), 2 * grid[0], 28 * grid[1], 28 * grid[2], 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def inputs_of(reference, frames, question):
    """What the processor of the public model would give for one clip and question."""
    model, tokenizer = reference
    count, height, width, _ = frames.shape
    cells = count * height * width // (2 * 28 * 28)
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    text = text.replace("<|video_pad|>", "<|video_pad|>" * cells)
    ids = tokenizer(text, return_tensors="pt").input_ids
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id).int(),
        "pixel_values_videos": torch.from_numpy(vlm.patchify(frames)),
        "video_grid_thw": torch.tensor([[count // 2, height // 14, width // 14]]),
        "second_per_grid_ts": torch.tensor([SECONDS]),
    }


@pytest.fixture(scope="module")
def expected(reference):
    """(grid, clip, question) -> prompt length, tokens generated, attention (n, heads, L, N), tokenizer."""
    model, tokenizer = reference
    found = {}
    for grid in GRIDS:
        for clip, frames in enumerate(clips_of(grid)):
            for question in QUESTIONS[clip]:
                inputs = inputs_of(reference, frames, question)
                prompt = inputs["input_ids"].shape[1]
                with torch.inference_mode():
                    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
                    tokens = ids[0, prompt:].tolist()
                    if tokens[-1] in model.generation_config.eos_token_id:
                        tokens = tokens[:-1]
                    inputs["input_ids"] = ids[:, : prompt + len(tokens)]
                    kinds = inputs["mm_token_type_ids"]
                    inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(tokens)))
                    attention = torch.cat(model(**inputs, output_attentions=True).attentions)
                video = inputs["input_ids"][0] == model.config.video_token_id
                found[grid, clip, question] = prompt, tokens, attention[..., video].numpy(), tokenizer
    return found


def content(tokenizer, token):
    word = tokenizer.decode([token], skip_special_tokens=True).strip().lower()
    return any(map(str.isalnum, word)) and word not in vlm.STOP_WORDS


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "rows, heads, tokens",
    [
        ("generated", "mean", "all"),
        ("generated", "max", "content"),
        ("predicting", "mean", "content"),
        ("last_prompt", "mean", "all"),
    ],
)
def test_maps_are_slices_of_the_full_attention(ours, expected, grid, rows, heads, tokens):
    layers = (0, 2, 3)
    reading = vlm.Reading(layers, heads, rows, tokens, max_new_tokens=12)
    answers = ours.answer(list(clips_of(grid)), QUESTIONS, SECONDS, reading)
    for clip, own in enumerate(QUESTIONS):
        for question, answer in zip(own, answers[clip], strict=True):
            prompt, generated, attention, tokenizer = expected[grid, clip, question]
            reduced = attention[list(layers)]
            reduced = reduced.mean(1) if heads == "mean" else reduced.max(1)  # (layers, L, N)
            wanted = range(len(generated))
            if tokens == "content":
                wanted = [i for i in wanted if content(tokenizer, generated[i])] or wanted
            first = {"generated": prompt, "predicting": prompt - 1, "last_prompt": prompt - 1}[rows]
            wanted = [0] if rows == "last_prompt" else wanted
            queries = [first + i for i in wanted]
            maps = reduced[:, queries].mean(1).reshape(-1, *grid)
            assert answer.maps.dtype == np.float32 and answer.maps.shape == (len(layers), *grid)
            np.testing.assert_allclose(answer.maps, maps, rtol=0, atol=TOLERANCE)
            assert maps.std() > 1e-3  # the weights give the maps a shape, or the comparison shows little
            if rows != "last_prompt":
                assert answer.text == tokenizer.decode(generated).strip()


def test_answers_differ_in_length_and_in_content(expected):
    """Otherwise the comparisons above would miss rows that end early and the choice of tokens."""
    cases = list(expected.values())
    assert len({len(generated) for _, generated, *_ in cases}) > 1
    shares = [np.mean([content(tokenizer, token) for token in tokens]) for _, tokens, _, tokenizer in cases]
    assert any(0 < share < 1 for share in shares)


def test_tokens_are_those_of_generate(ours, reference):
    """Token by token and over more of them, with a question alone: no padding and no mask."""
    model, tokenizer = reference
    grid = GRIDS[1]
    for frames, question in itertools.product(clips_of(grid, seed=1), ("Where is the thing?", "The end.")):
        inputs = inputs_of(reference, frames, question)
        ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        reading = vlm.Reading((0,), max_new_tokens=30)
        [[answer]] = ours.answer([frames], [[question]], SECONDS, reading)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_preferred_answers_are_those_of_the_whole_model(ours, reference):
    """Questions without a video and of several lengths at once, against one forward pass each."""
    model, tokenizer = reference
    questions = (
        "Is it?",
        "Does the video show a rather long thing in the air? Answer Yes or No.",
        "The end?",
    )
    yes, no = (tokenizer(word).input_ids[0] for word in ("Yes", "No"))
    expected = []
    for question in questions:
        message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        expected.append(float(logits[yes] - logits[no]))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(ours.prefer(questions, "Yes", "No"), expected, rtol=0, atol=TOLERANCE)


def test_patches_are_those_of_the_public_image_processor():
    """Of one still frame, shown twice; resizing is left out, both sides being multiples of 28."""
    frame = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 10**7})
    expected = processor(images=[frame], return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, 4, 6]]
    # Normalised values up to 2.7: float32 in another order of operations.
    np.testing.assert_allclose(vlm.patchify(np.stack([frame] * 2)), expected["pixel_values"], atol=2e-6)
