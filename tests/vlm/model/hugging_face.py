"""Tiny transformers models and tokenizers, saved to a folder as their users save them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.vlm.model.tiny import TEXTS

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_tokenizer(folder: Path, *, end_is_padding: bool = False) -> int:
    """A word-level tokenizer with BERT's special tokens; returns the size of its vocabulary."""
    words = [*_SPECIAL, *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[SEP]" if end_is_padding else "[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    ).save_pretrained(folder)
    return len(words)


def save_text_model(folder: Path, kind: str = "bert", *, weights: bool = True) -> None:
    """A two-layer text model of the kind, with a tokenizer beside it."""
    fields: dict[str, Any] = {
        "vocab_size": save_tokenizer(folder),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "attention_dropout": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "distilbert":
        fields |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "dropout": 0.0}
    if kind == "gpt2":
        fields |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    _save(transformers.AutoConfig.for_model(kind, **fields), folder, weights=weights)


def save_language_model(folder: Path, kind: str = "gpt2", *, weights: bool = True, **fields: Any) -> Any:
    """A three-layer causal language model with its tokenizer, which sets no end to a text, and GPT-2's no beginning."""
    size = _save_plain_tokenizer(folder, "gpt2" if kind.startswith("gpt") else "llama")
    sizes: dict[str, Any] = {"vocab_size": size, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 0}
    sizes["eos_token_id"] = 0 if kind.startswith("gpt") else 1
    if kind == "gpt_neo":
        sizes |= {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local"], 1], [["global"], 1]]}
        sizes.pop("num_hidden_layers")
    elif kind == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    elif kind == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif kind != "gpt_neox":
        sizes |= {"num_key_value_heads": 2}
    configuration = transformers.AutoConfig.for_model(kind, **{**sizes, **fields})
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    configuration.save_pretrained(folder)
    if weights:
        model.save_pretrained(folder)
    return model.eval()


def _save_plain_tokenizer(folder: Path, kind: str) -> int:
    """A word-level tokenizer: of GPT-2's kind with one mark that it never sets, or of Llama's, which begins texts."""
    first, last = ("<|endoftext|>", "<|endoftext|>") if kind == "gpt2" else ("<s>", "</s>")
    words = [*dict.fromkeys([first, last, "<unk>"]), *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=first, eos_token=last, unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


def save_vision_model(folder: Path, kind: str = "vit", **fields: Any) -> None:
    """A two-layer vision model of the kind for images of 32 pixels."""
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    configuration = transformers.AutoConfig.for_model(kind, **{**sizes, "intermediate_size": 64, **fields})
    _save(configuration, folder, weights=True)


def save_whole(folder: Path, kind: str, *, processor: bool = True) -> Any:
    """A two-layer CLIP or SigLIP with its tokenizer and image processor; scale and bias are such as training leaves."""
    size = save_tokenizer(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**shape, "vocab_size": size, "max_position_embeddings": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        configuration: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        images: Any = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        configuration = transformers.SiglipConfig(text_config=text, vision_config=vision)
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    transformers.set_seed(0)
    model = transformers.AutoModel.from_config(configuration)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        model.logit_scale.fill_(3.3)
        if kind == "siglip":
            model.logit_bias.fill_(-7.5)
    model.save_pretrained(folder)
    if processor:
        images.save_pretrained(folder)
    return model.eval()


def _save(configuration: Any, folder: Path, *, weights: bool) -> None:
    configuration.save_pretrained(folder)
    if weights:
        transformers.set_seed(0)
        transformers.AutoModel.from_config(configuration).save_pretrained(folder)
