"""Load LoRA adapters into a pipeline or a model, and merge them into its weights."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from stdit_model.errors import WeightsError, reason
from stdit_model.weights.find_lora import find_lora, require_peft
from stdit_model.weights.folders import LORA_FILE
from stdit_model.weights.hub import hub_reason
from stdit_model.weights.lora import PREFIX, check_lora, peft_settings, read_lora

M = TypeVar("M", bound=nn.Module)


class LoRALoader(CogVideoXLoraLoaderMixin):
    """The methods of diffusers' pipelines for LoRA adapters of their transformer, with strict loading.

    `load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights`, `delete_adapters`, `save_lora_weights` and
    the others are called as with any pipeline of diffusers; they need peft (extra `lora`).
    """

    transformer: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load an adapter beside those that are loaded; it is then the active one.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder (such as a run's) or a Hub id; or its tensors.
            adapter_name: for `set_adapters`. [default: default_0, default_1 and so on]
            hotswap: whether to replace the tensors of the adapter of this name.
            options: of diffusers' `load_lora_weights`, such as weight_name and revision.

        Raises:
            SettingsError: peft is not installed.
            WeightsError: it cannot be read, or is an adapter of another model; nothing is loaded then.
        """
        require_peft("load_lora_weights")
        source: Any = pretrained_model_name_or_path_or_dict
        own = {"low_cpu_mem_usage": options.pop("low_cpu_mem_usage", True), "hotswap": hotswap, "_pipeline": self}
        if isinstance(source, Mapping):
            _load(self.transformer, dict(source), None, "the adapter", adapter_name, own)
            return
        path = Path(source).expanduser()
        if (path / LORA_FILE).is_file():
            options.setdefault("weight_name", LORA_FILE)
        options = {"use_safetensors": True, **options, "return_lora_metadata": True}
        try:
            tensors, metadata = self.lora_state_dict(str(path), **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise WeightsError(f"{source}: cannot load this adapter ({hub_reason(error, path)})") from error
        _load(self.transformer, tensors, metadata, str(source), adapter_name, own)


def load_adapters(model: Any, loras: Sequence[tuple[str, float]]) -> list[Path]:
    """Load adapters into a model, all of them active, and return their files.

    Args:
        model: an STDiT, changed in place.
        loras: where each adapter is (see `stdit_model.weights.find_lora.find_lora`), and the factor of its update.

    Raises:
        SettingsError: peft is not installed.
        WeightsError: one cannot be found or read, or is an adapter of another model.
    """
    if not loras:
        return []
    require_peft("--lora")
    files = [find_lora(source) for source, _ in loras]
    names = [f"lora_{number}" for number, _ in enumerate(loras, start=1)]
    for file, name in zip(files, names, strict=True):
        _load(model, *read_lora(file), str(file), name, {"low_cpu_mem_usage": True})
    model.set_adapters(names, [scale for _, scale in loras])
    return files


def merge_adapters(model: M, loras: Sequence[tuple[str, float]]) -> M:
    """Add the updates of adapters to the weights of a model, in place, and return it; see `load_adapters`.

    The sums are computed in float32 and stored in the dtypes of the weights.
    """
    adapted: Any = model
    dtypes = {name: parameter.dtype for name, parameter in adapted.named_parameters()}
    if load_adapters(adapted.float() if loras else adapted, loras):
        adapted.fuse_lora()
        adapted.unload_lora()
        for name, parameter in adapted.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
    return model


def _load(
    model: Any,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, Any] | None,
    source: str,
    adapter_name: str | None,
    options: Mapping[str, Any],
) -> None:
    check_lora(tensors, model, source)
    settings = peft_settings(metadata, tensors, source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            model.load_lora_adapter(
                tensors, prefix=PREFIX.rstrip("."), adapter_name=adapter_name, metadata=settings, **options
            )
    except (RuntimeError, TypeError) as error:  # of peft, where metadata and tensors disagree
        raise WeightsError(f"{source}: its metadata does not fit its tensors ({reason(error)})") from error
