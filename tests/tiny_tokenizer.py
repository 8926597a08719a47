"""A T5 tokenizer of a few hundred tokens, in the files that a public one comes in."""

import json
import os
import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

EXTRA_IDS = 8
_WORDS = [f"▁{word}" for word in ("a", "the", "red", "blue", "ball", "box", "falls", "rolls", "on", "into")]
_CHARACTERS = ".,;:!?'\"-()&" + string.ascii_uppercase + string.digits + "静态画面模糊质量差"


def save_tiny_tokenizer(folder: str | os.PathLike, vocab_size: int = 250) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    A Unigram model with pad 0, end 1, unknown 2 and, last, the sentinels <extra_id_7> to <extra_id_0>:
    `vocab_size` tokens in all, 61 to 781. Runs of characters that it does not know become token 2.
    """
    pieces = [("▁", -3.0)]
    pieces += [(letter, -6.0) for letter in string.ascii_lowercase]
    pieces += [(word, -5.0) for word in _WORDS]
    pieces += [(character, -6.0) for character in _CHARACTERS]
    pieces += [(a + b, -9.0) for a in string.ascii_lowercase for b in string.ascii_lowercase]
    plain = vocab_size - 3 - EXTRA_IDS
    if not 50 <= plain <= len(pieces):
        raise ValueError(f"no tiny tokenizer has {vocab_size} tokens")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    sentinels = [f"<extra_id_{i}>" for i in range(EXTRA_IDS)]
    vocabulary = [(token, 0.0) for token in special.values()]
    vocabulary += pieces[:plain] + [(token, 0.0) for token in reversed(sentinels)]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([*special.values(), *sentinels])
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    tokens = {**special, "additional_special_tokens": sentinels}
    config = {**tokens, "tokenizer_class": "T5Tokenizer", "extra_ids": EXTRA_IDS, "model_max_length": 512}
    for name, content in [("tokenizer_config", config), ("special_tokens_map", tokens)]:
        with open(os.path.join(folder, f"{name}.json"), "w") as file:
            json.dump(content, file, indent=1)
