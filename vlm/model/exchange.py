"""Models in open_clip's own format, with proof that open_clip computes the same from them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vlm.aside import folder_aside
from vlm.atomic import write_text
from vlm.batch import Images, Texts
from vlm.errors import UserError, reason
from vlm.model.captioner import CaptionDecoder
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.foreign import is_hub_name, names_of_open_clip, write_beside
from vlm.model.open_clip_fields import CORRECT_CLS_MASK
from vlm.model.open_clip_folder import CONFIG_FILE, WEIGHTS_FILES
from vlm.model.open_clip_kinds import OpenClipImageConfig, OpenClipTextConfig
from vlm.model.open_clip_names import has_plain_layout, to_open_clip
from vlm.model.tokenizer import TokenBatch
from vlm.outputs import likelihood_of
from vlm.paths import new_folder
from vlm.tensor_file import save_tensors

TOLERANCE, LIKELIHOOD_TOLERANCE = 1e-5, 1e-4
_MLP_RATIO = 4.0  # of open_clip's decoders
_LOAD_ERRORS = (AssertionError, AttributeError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Parity:
    """The largest absolute difference of any coordinate between this model's embeddings and the exported model's.

    `likelihood` is that of any token's log-likelihood under the captioning decoders; None where there are none.
    """

    image: float
    text: float
    num_images: int
    num_texts: int
    likelihood: float | None = None


def export_open_clip(
    model: DualEncoder, directory: Path, images: UInt8[Tensor, "images 3 size size"], captions: Sequence[str]
) -> Parity:
    """Write `model` to the new folder `directory` for `open_clip.create_model_and_transforms("local-dir:DIRECTORY")`.

    Before the folder gets its name, open_clip itself loads it and encodes `images` (through the exported preprocessing)
    and `captions` (through the exported tokenizer at full length), on the model's device. Raises UserError, and leaves
    nothing behind, when open_clip cannot express or load the model, or when an embedding differs by more than 1e-5.
    """
    model_cfg = open_clip_config(model)
    directory = new_folder(directory, "export")
    try:
        with folder_aside(directory) as aside:
            _write(model, model_cfg, aside)
            return _measure(model, aside, images, captions)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error


def open_clip_config(model: DualEncoder) -> dict[str, Any]:
    """The `model_cfg` that makes open_clip build this model. Raises UserError when open_clip has no such towers."""
    towers = model.config.towers
    assert towers is not None  # the configuration of a built model is resolved
    image, text = towers.image, towers.text
    if not isinstance(image, OpenClipImageConfig):
        raise UserError(f"open_clip has no counterpart of the image tower ({image.title})")
    if not isinstance(text, OpenClipTextConfig):
        raise UserError(f"open_clip has no counterpart of the text tower ({text.title})")
    for name in ("image_head", "text_head"):
        if (head := getattr(model.config, name)) is not None:
            raise UserError(
                f"open_clip has no counterpart of {name} ({head.kind}); --before-head exports the towers alone"
            )
    if text.text_cfg.get(CORRECT_CLS_MASK):
        raise UserError(
            f"open_clip has no counterpart of text_cfg.{CORRECT_CLS_MASK}: its class token sees other tokens"
        )
    _require_findable(text.text_cfg)
    fields: dict[str, Any] = {
        "embed_dim": towers.embed_dim,
        "vision_cfg": image.vision_cfg,
        "text_cfg": text.text_cfg,
        "quick_gelu": bool(model.config.quick_gelu or image.quick_gelu or text.quick_gelu),
        "custom_text": not has_plain_layout(model),
    }
    if model.logit_bias is not None:
        fields["init_logit_bias"] = model.config.init_logit_bias
    if model.decoder is not None:
        fields["multimodal_cfg"] = _decoder_fields(model)
        fields["vision_cfg"] = {**image.vision_cfg, "output_tokens": True}
        fields["text_cfg"] = {**text.text_cfg, "output_tokens": True}
    return fields


def _decoder_fields(model: DualEncoder) -> dict[str, Any]:
    """open_clip's `multimodal_cfg` of a decoder. Raises UserError for one that its CoCa class cannot hold."""
    captioner, decoder = model.config.captioner, model.decoder
    assert isinstance(captioner, CaptionerConfig)
    assert isinstance(decoder, CaptionDecoder)
    fitted = isinstance(decoder.state_projection, nn.Identity) and isinstance(decoder.image_projection, nn.Identity)
    is_held = captioner.pooler == "tower" and captioner.feature_map is None and captioner.mlp_ratio == _MLP_RATIO
    if not (fitted and is_held):
        can_go = model.image_pooler is None
        raise UserError(
            f"open_clip has no counterpart of the captioner (pooler {captioner.pooler}): its decoder looks at the "
            "image tower's own tokens, all of one width, with MLPs four times as wide"
            + ("; --without-decoder exports the dual encoder alone" if can_go else "")
        )
    return {
        "context_length": model.text.context_length,
        "vocab_size": decoder.vocabulary.weight.shape[1],
        "width": captioner.width,
        "heads": captioner.heads,
        "layers": captioner.layers,
        "ls_init_value": captioner.layer_scale,
    }


def _require_findable(text_cfg: Mapping[str, Any]) -> None:
    """Raise UserError where the configuration of a Hugging Face text model is not where open_clip looks."""
    name = text_cfg.get("hf_model_name")
    if name and Path(name).is_dir():
        _require_no_code(Path(name))
    if not name or Path(name).is_dir() or name in names_of_open_clip():
        return
    if "/" not in name or not is_hub_name(name):
        raise UserError(f"open_clip looks for the text model's configuration in {name!r}, and there is no such folder")


def _require_no_code(folder: Path) -> None:
    """Raise UserError where open_clip, which reads the folder itself, would run code that lies in it."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # what open_clip makes of it is told where it is tried
        if isinstance(content, dict) and "auto_map" in content:
            raise UserError(
                f"{folder / name} names code of its own (auto_map), which open_clip would run: not exported"
            )


def _write(model: DualEncoder, model_cfg: dict[str, Any], folder: Path) -> None:
    preprocessing = model.image_spec.model_dump(mode="json")
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocessing}
    write_text(folder / CONFIG_FILE, json.dumps(content, indent=2))
    save_tensors(folder / WEIGHTS_FILES[0], to_open_clip(model), {"format": "pt"})
    write_beside(folder, model.files)


@torch.no_grad()
def _measure(
    model: DualEncoder, folder: Path, images: UInt8[Tensor, "images 3 size size"], captions: Sequence[str]
) -> Parity:
    device = model.logit_scale.device
    try:
        exported, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=device)
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(captions))
    except _LOAD_ERRORS as error:
        raise UserError(f"open_clip cannot load this model: {reason(error)}") from error
    pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    with _evaluating(model), _evaluating(exported):
        texts = model.tokenizer(captions)
        parity = Parity(
            image=_distance(model.encode_image(images.to(device)), exported.encode_image(pixels.to(device))),
            text=_distance(
                model.encode_text(texts.tokens.to(device), texts.lengths.to(device)),
                exported.encode_text(tokens.to(device)),
            ),
            num_images=len(images),
            num_texts=len(captions),
            likelihood=None if model.decoder is None else _likelihood_distance(model, images, pixels, texts, exported),
        )
    # Written so that a NaN fails too.
    if not (
        parity.image <= TOLERANCE and parity.text <= TOLERANCE and (parity.likelihood or 0.0) <= LIKELIHOOD_TOLERANCE
    ):
        raise UserError(
            f"open_clip computes something else from this model: images differ by up to {parity.image:.1e}, "
            f"texts by up to {parity.text:.1e} (tolerance {TOLERANCE:.0e})"
            + ("" if parity.likelihood is None else _likelihood_words(parity.likelihood))
        )
    return parity


def _likelihood_words(difference: float) -> str:
    return f", log-likelihoods of tokens by up to {difference:.1e} (tolerance {LIKELIHOOD_TOLERANCE:.0e})"


def _likelihood_distance(model: DualEncoder, images: Tensor, pixels: Tensor, texts: TokenBatch, exported: Any) -> float:
    """The largest difference of a token's log-likelihood, of as many pairs as there are of both images and texts."""
    device, count = model.logit_scale.device, min(len(images), len(texts.lengths))
    ids, lengths = texts.tokens[:count].to(device), texts.lengths[:count].to(device)
    inputs = {"image": Images(images[:count].to(device)), "text": Texts(ids, lengths)}
    ours = model(inputs, frozenset({likelihood_of("text")}))[likelihood_of("text")][:, 0]
    full = model.text.padded(ids, lengths, model.text.context_length)
    log_p = functional.log_softmax(exported(pixels[:count].to(device), full)["logits"], dim=-1)
    theirs = log_p.gather(2, full[:, 1:, None])[..., 0]
    counted = torch.arange(theirs.shape[1], device=device) < (lengths - 1)[:, None]
    return float((ours - theirs[counted]).abs().max())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _distance(ours: Float[Tensor, "batch dim"], theirs: Float[Tensor, "batch dim"]) -> float:
    return (ours - functional.normalize(theirs, dim=-1)).abs().max().item()
