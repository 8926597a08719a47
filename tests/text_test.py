"""Prompt cleaning, and tokenizers read from local files, whole and damaged."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from prophy_jax.models.text import tokenizer as text
from prophy_jax.run.errors import UserError
from tests.conftest import ROOT
from tests.tiny_tokenizer import save_tiny_tokenizer

TOKENS, ROWS = 250, 256

# Prompts and what Wan2.1 makes of them.
CLEANED = [
    ("", ""),
    (" \t\n ", ""),
    ("A  ball\tfalls\r\n\r\ninto   the water. ", "A ball falls into the water."),
    ("salt &amp; pepper &lt;3", "salt & pepper <3"),
    ("twice &amp;lt; escaped", "twice < escaped"),
    # ftfy resolves entities as well, but not beside a "<", which may be HTML: twice is then all.
    ("1 < 2 &amp;lt; 3 &amp;amp;lt; 4", "1 < 2 < 3 &lt; 4"),
    ("&nbsp; a &amp;nbsp; b &#8195;", "a b"),
    ("schÃ¶n, donâ€™t", "schön, don't"),  # UTF-8 read as Latin-1 and as Windows-1252
    ("\u201ccurly\u201d \u2018quotes\u2019", "\"curly\" 'quotes'"),
    ("色调艳丽，过曝，\u3000静态！", "色调艳丽,过曝, 静态!"),  # full-width marks, ideographic space
    ("Ｆｕｌｌ width １２", "Full width 12"),
    ("\ufeffbyte\u200border\u00a0mark", "byte\u200border mark"),
    ("cafe\u0301", "café"),
    ("\x1b[31mred\x1b[0m\x00ball", "redball"),
    ("a\u2028b\x0cc\x0bd", "a b cd"),
    ("ﬁne “ligatures” …", 'fine "ligatures" …'),
    ("Keeps Case, 'marks'; (and) emoji 🏀.", "Keeps Case, 'marks'; (and) emoji 🏀."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(path, TOKENS)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return text.load_tokenizer(folder, ROWS)


@pytest.mark.parametrize(("prompt", "expected"), CLEANED)
def test_clean(prompt, expected):
    assert text.clean(prompt) == expected


def test_ids_end_with_the_end_token_and_are_padded_with_zeros(tokenizer):
    ids, mask = tokenizer(["a red  ball &amp; the\nbox", ""], 12)
    assert (ids.dtype, mask.dtype, ids.shape, mask.shape) == (np.int32, bool, (2, 12), (2, 12))
    pieces = ["▁a", "▁red", "▁ball", "▁", "&", "▁the", "▁box", "</s>"]
    assert tokenizer.backend.convert_ids_to_tokens(ids[0, :8]) == pieces
    assert ids[0, 7:].tolist() == [1, 0, 0, 0, 0] and mask[0].tolist() == [True] * 8 + [False] * 4
    assert ids[1].tolist() == [1] + [0] * 11 and mask[1].tolist() == [True] + [False] * 11


def test_ids_are_those_of_transformers(folder, tokenizer):
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = [prompt for prompt, _ in CLEANED] + ["the ball falls, " * 40, "</s> a <extra_id_3> <pad> b"]
    for length in (2, 16, 512):
        # As WanPipeline calls it, after its cleaning.
        expected = reference(
            [text.clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
        )
        ids, mask = tokenizer(prompts, length)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(mask, np.array(expected["attention_mask"]) == 1)
        assert np.all(ids[mask & np.roll(~mask, -1, axis=1)] == 1)
    assert ids.max() < TOKENS


def test_a_long_prompt_keeps_its_end_token_and_tells_what_it_lost(tokenizer):
    prompt = "the  red ball falls into &lt;the&gt; box"
    whole = int(tokenizer([prompt], 64)[1].sum())
    assert tokenizer.lost(prompt, 64) == tokenizer.lost(prompt, whole) == tokenizer.lost("", 1) == ""
    ids, mask = tokenizer([prompt], 4)
    assert tokenizer.backend.convert_ids_to_tokens(ids[0]) == ["▁the", "▁red", "▁ball", "</s>"] and mask.all()
    assert tokenizer.lost(prompt, 4) == "falls into <the> box"
    assert tokenizer.lost(prompt, whole - 1) == "box"
    assert tokenizer.lost("the reds", 3) == "s"  # cut inside a word
    assert tokenizer.lost(prompt, 1) == "the red ball falls into <the> box"
    for length in range(1, whole):
        kept = tokenizer.backend.decode(tokenizer([prompt], length)[0][0], skip_special_tokens=True)
        # "<" and ">" are unknown to the tokenizer and missing from what it decodes.
        together = (kept + tokenizer.lost(prompt, length)).replace("<", "").replace(">", "")
        assert together.replace(" ", "") == "theredballfallsintothebox"


def test_no_prompts(tokenizer):
    ids, mask = tokenizer([], 12)
    assert (ids.shape, mask.shape, ids.dtype, mask.dtype) == ((0, 12), (0, 12), np.int32, bool)


@pytest.mark.parametrize(
    "tokenizer_class", ["T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]
)
def test_every_class_that_public_files_name(tmp_path, tokenizer, tokenizer_class):
    save_tiny_tokenizer(tmp_path, TOKENS)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    other = text.load_tokenizer(tmp_path, ROWS)
    prompts = [prompt for prompt, _ in CLEANED]
    np.testing.assert_array_equal(other(prompts, 40)[0], tokenizer(prompts, 40)[0])


def test_files_that_transformers_saved(tmp_path, tokenizer):
    tokenizer.backend.save_pretrained(tmp_path)
    prompts = [prompt for prompt, _ in CLEANED]
    again = text.load_tokenizer(tmp_path, ROWS)
    np.testing.assert_array_equal(again(prompts, 40)[0], tokenizer(prompts, 40)[0])


def run_python(code):
    """Runs code in a process of its own: transformers keeps the stderr that it found when imported."""
    environment = {k: v for k, v in os.environ.items() if "TOKENIZERS" not in k and "TRANSFORMERS" not in k}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_terminal_stays_clean_and_nothing_is_asked_of_the_network(folder):
    code = f"""
import os, socket
def refuse(*args): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from prophy_jax.models.text import tokenizer as text
tokenizer = text.load_tokenizer({str(folder)!r}, {ROWS})
tokenizer(["a ball"] * 100, 8)
tokenizer.lost("a ball " * 2000, 512)
if os.fork() == 0: os._exit(0)
os.wait()
"""
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, "reading it takes one more package, pip install sentencepiece protobuf"),
        (True, "transformers cannot read the tokenizer in"),  # the file is no SentencePiece model
    ],
)
def test_sentencepiece_model_alone(tmp_path, installed, message):
    save_tiny_tokenizer(tmp_path, TOKENS)
    (tmp_path / "tokenizer.json").rename(tmp_path / "spiece.model")
    code = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: {installed} if name == "sentencepiece" else real(name, *rest)
from prophy_jax.models.text import tokenizer as text
try:
    text.load_tokenizer({str(tmp_path)!r}, {ROWS})
except text.UserError as error:
    print(error)
"""
    result = run_python(code)
    assert message in result.stdout and (result.returncode, result.stderr) == (0, "")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_nothing(folder):
    pass


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


def remove_config(folder):
    (folder / "tokenizer_config.json").unlink()


def truncate(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def nest(name):
    return lambda folder: (folder / name).write_text("[" * 100_000)


def not_utf8(folder):
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe{}")


def other_json(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def other_special_token(name):
    def damage(folder):
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            edit(folder / file, **{name: "<unk>"})

    return damage


def no_end_token(folder):
    # This class takes the template from the file, T5Tokenizer has its own.
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit(folder / "tokenizer.json", post_processor=None)


def code_of_its_own(folder):
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass Own: pass\n")
    edit(
        folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
    )


@pytest.mark.parametrize(
    ("damage", "rows", "message"),
    [
        (damage_nothing, TOKENS - 1, "has 250 tokens, the text encoder 249 rows"),
        (damage_nothing, 278, "has 250 tokens, the text encoder 278 rows"),
        (remove_all, ROWS, "holds neither tokenizer.json nor spiece.model"),
        (remove_config, ROWS, "holds no tokenizer_config.json"),
        (truncate("tokenizer.json"), ROWS, "tokenizer.json is damaged"),
        (truncate("tokenizer_config.json"), ROWS, "tokenizer_config.json is damaged"),
        (nest("tokenizer_config.json"), ROWS, "tokenizer_config.json is damaged"),
        (truncate("special_tokens_map.json"), ROWS, "special_tokens_map.json is damaged"),
        (not_utf8, ROWS, "tokenizer.json is damaged"),
        (other_json, ROWS, "transformers cannot read the tokenizer in"),
        (other_special_token("pad_token"), ROWS, "is no T5 tokenizer: it pads with 2"),
        (other_special_token("eos_token"), ROWS, "is no T5 tokenizer"),
        (no_end_token, ROWS, r"turns an empty prompt into \[\]"),
        (code_of_its_own, ROWS, "transformers cannot read the tokenizer in"),
    ],
)
def test_wrong_tokenizers(tmp_path, capfd, damage, rows, message):
    save_tiny_tokenizer(tmp_path, TOKENS)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        text.load_tokenizer(tmp_path, rows)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert capfd.readouterr() == ("", "")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere holds neither tokenizer.json nor spiece.model"):
        text.load_tokenizer(tmp_path / "nowhere", ROWS)


def test_all_rows_may_be_tokens(folder):
    assert len(text.load_tokenizer(folder, TOKENS).backend) == TOKENS
    assert len(text.load_tokenizer(folder, 277).backend) == TOKENS  # nine tenths are tokens
