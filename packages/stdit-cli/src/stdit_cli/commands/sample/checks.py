"""What can be wrong with a request, found before a model is loaded."""

from stdit_cli.commands.sample.outputs import video_format
from stdit_cli.commands.sample.request import SampleRequest, Settings, parse_adapter
from stdit_train.errors import ConfigError
from stdit_train.pipeline.find import CheckpointSource


def check_request(request: SampleRequest, source: CheckpointSource) -> str:
    """Check a request against the files that it names and what its checkpoint was trained for.

    Args:
        request: of which `SampleRequest.check` and `check_out` found nothing wrong.
        source: its checkpoint.

    Returns:
        The format of the videos.

    Raises:
        ConfigError, DataError, WeightsError: a picture, video or adapter that cannot be read, a checkpoint of another
            kind, a VAE or text encoder that is not found, or settings that do not fit the checkpoint.
    """
    from stdit_model.sampling.components import require
    from stdit_model.sampling.schedulers import check_sampler, compat
    from stdit_model.weights.find_lora import find_lora, require_peft

    settings = request.settings
    named = {"vae": settings.vae, "text_encoder": settings.text_encoder}
    require({part: component for part, component in named.items() if component is not None})
    for adapter in settings.lora or ():
        require_peft("--lora")
        find_lora(parse_adapter(adapter)[0])
    trained = source.trained()
    reference = compat(settings.compat) if settings.compat is not None else {}
    sampler = settings.sampler or reference.get("sampler")
    if sampler is not None:
        check_sampler(sampler, trained.flow)
    frames = 2 if settings.video is not None else settings.frames or trained.frames  # two or more
    longer = trained.frames > 1 and (settings.video is not None or frames > trained.frames)
    if longer and settings.long == "windows" and (settings.overlap or 0) >= trained.frames:
        raise ConfigError(
            f"--overlap {settings.overlap}: windows of {trained.frames} frames can share 1 to {trained.frames - 1}"
        )
    _check_media(settings)
    kind = video_format(request, frames)
    assert kind is not None  # since the number of frames is known
    return kind


def _check_media(settings: Settings) -> None:
    """Check that the picture or video to start from can be read, by its first frame."""
    for file in (settings.image, settings.video):
        if file is not None:
            from stdit_data.video.probe import probe  # with torch, which what is checked before does without

            probe(file)
