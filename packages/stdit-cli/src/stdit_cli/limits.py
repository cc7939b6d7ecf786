"""What of a request lies outside what its checkpoint was trained for, in one line."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stdit_cli.commands.sample.request import Job

if TYPE_CHECKING:
    from stdit_cli.commands.sample.generate import VideoGenerator

SHOWN = 10  # words at most
VOCABULARY = 100  # a tokenizer of fewer words has them listed


def outside(generator: "VideoGenerator", jobs: list[Job]) -> Iterator[str]:
    """One line of warning, or none; and one that says how a long video is made."""
    from stdit_model.text import dropped_text, unknown_words

    pipeline = generator.pipeline
    config, tokenizer = pipeline.config, pipeline.tokenizer
    findings = []
    trained = (config.num_frames, config.height, config.width)
    asked = (config.num_frames if generator.windowed else generator.new_frames, *generator.size)
    if asked != trained:
        findings.append(f"{_by(asked)} (frames x height x width; trained on {_by(trained)})")
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    unknown = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(tokenizer, prompt)))
    if unknown:
        words = ", ".join(repr(word) for word in unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        known = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
        listing = f" (it knows {', '.join(known)})" if len(known) < VOCABULARY else ""
        findings.append(f"it does not know {words}{listing}")
    length = pipeline.transformer.config.model_max_length
    cut = [rest for prompt in prompts if (rest := dropped_text(tokenizer, prompt, length))]
    if cut:
        others = f", and of {len(cut) - 1} more prompts" if len(cut) > 1 else ""
        findings.append(f"it reads {length} tokens of a prompt, which leaves out {cut[0]!r}{others}")
    if findings:
        yield f"warning: outside what this checkpoint was trained for: {'; '.join(findings)}"
    if generator.windowed:
        window = config.num_frames
        yield f"{generator.frames} frames, in windows of {window}; --long stretch or whole makes them at once"


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
