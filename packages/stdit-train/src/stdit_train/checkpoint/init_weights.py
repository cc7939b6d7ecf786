"""Load initial weights: of another run, a saved model or pipeline, or an Open-Sora or PixArt file."""

from pathlib import Path

from stdit_model import STDiT
from stdit_model.convert import find
from stdit_model.weights.folders import LORA_FILE
from stdit_model.weights.load import NULL_CAPTION, Weights, saved_weights
from stdit_train.config.load import ConfigError
from stdit_train.distributed.sharded_weights import load_full_state_dict

_SIZES = (
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "in_channels",
    "caption_channels",
    "learn_sigma",
    "patch_size",
)


def load_initial(model: STDiT, source: str) -> str:
    """Load weights into a model, one tensor at a time, and return a line that describes them.

    Args:
        model: filled in place, sharded or not.
        source: run folder (its EMA weights), pipeline or model folder, .pth or .safetensors file, or Hub id. An image
            model (PixArt) gives every variant what it has; the temporal attention keeps its start.

    Raises:
        ConfigError: sizes, patch or variant differ, and the message names the first that does; or it is an adapter.
        FileNotFoundError, ValueError: it can't be read.
    """
    folder = Path(source).expanduser()
    if (folder / LORA_FILE).is_file() and not (folder / "transformer").is_dir():
        raise ConfigError(f"{source} holds a LoRA adapter: merge it into its model first, with `stdit weights merge`")
    if (folder / "pipeline" / "transformer").is_dir():
        folder = folder / "pipeline"
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if (folder / "config.json").is_file() and "STDiT" in (folder / "config.json").read_text():
        found = saved_weights(STDiT, folder)
    else:
        found = find(source, num_heads=model.config.num_heads)
    image = any(".attn_temp." in name for name in found.new)
    _compare(model, found, source, image)
    known = model.state_dict().keys()
    tensors = ((name, tensor) for name, tensor in found.read() if not image or name in known)
    load_full_state_dict(model, tensors, allow_missing=True)
    kind = "an image model; the temporal attention is new" if image else f"a {found.config['variant']} model"
    if NULL_CAPTION in found.new:
        kind += "; it has no null caption, which starts at random"
    return f"starting from {source}: {kind}"


def _compare(model: STDiT, found: Weights, source: str, image: bool) -> None:
    names = [*_SIZES, "model_max_length"] + ([] if image else ["variant"])
    for name in names:
        theirs, ours = found.config.get(name, model.config[name]), model.config[name]
        theirs, ours = (tuple(v) if isinstance(v, list) else v for v in (theirs, ours))  # patch sizes, from JSON
        if theirs != ours:
            raise ConfigError(
                f"{source} has {name} {theirs}, this run {ours}: choose the stage's model to match (--variant, "
                "--set model.preset=..., model.depth=..., --vae, --text-encoder)"
            )
