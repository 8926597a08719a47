"""A Qwen2.5-VL of a hundred thousand random weights, in the files that a public one comes in.

python -m tests.tiny_vlm DIR [SEED]
"""

import os
import sys

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# In the order of the public one: a default system message, then per message its parts.
TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' if part.type == 'video' else part.text }}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def save_tiny_vlm(folder: str | os.PathLike, seed: int = 0, layers: int = 4) -> None:
    """Writes config, generation config, weights, tokenizer and chat template into `folder`.

    The tokenizer knows bytes, a few merged ones, and the special tokens. Weights are drawn with a deviation
    that gives the attention a shape: at the usual 0.02 it would be nearly even.
    """
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n")]
    pieces = letters + ["".join(pair) for pair in merges]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL),
        chat_template=TEMPLATE,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=64,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_q" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("bias") or "embed" in name:
                parameter.copy_(0.5 * noise)
            else:  # queries and keys larger, for attention with peaks
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(gain * parameter[0].numel() ** -0.5 * noise)
        # Answers of letters more than of odd bytes, and of different lengths.
        words = [
            index for index, piece in enumerate(pieces) if piece.strip("Ġ").isascii() and piece[-1].isalpha()
        ]
        model.lm_head.weight[words] *= 1.6
        model.lm_head.weight[ids["<|im_end|>"]] *= 1.8
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    save_tiny_vlm(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
