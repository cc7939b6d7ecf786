"""Local captioners, and a server's: tiny random models laid out as the real ones are, and a server on the loopback."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stdit_data import stores
from stdit_data.curation.caption import CaptionStep, checked, flagged
from stdit_data.curation.captioners.prompts import Question
from stdit_data.curation.captioners.server import base_url
from stdit_data.curation.engine import run
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.workers.executors import Inline
from stdit_data.workers.work import Unavailable

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["describe", "a", "red", "circle", "square", "moves", "left", "right", "over", "white", "snow", "and", "stops"]


def make_tokenizer(*special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *special, *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, additional_special_tokens=list(special))


def template(image: str, images: str = "message.content") -> str:
    """A chat template with a placeholder for each image."""
    return (
        "{% for message in messages %}{% for part in " + images + " %}{% if part.type == 'image' %}" + image + " "
        "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )


def make_llava(folder: Path, chat_template: str | None = None) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        set_seed,
    )

    tokenizer = make_tokenizer("<image>")
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=32, patch_size=16, projection_dim=16),
        text_config=LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(tokenizer), **ends),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    set_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template or template("<image>"),
    ).save_pretrained(folder)
    return folder


def make_qwen(folder: Path) -> Path:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        set_seed,
    )

    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = make_tokenizer(*special)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(special))
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**SMALL, **ends, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    set_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=template("<|vision_start|> <|image_pad|> <|vision_end|>"),
    ).save_pretrained(folder)
    return folder


def questions() -> list[Question]:
    rng = np.random.default_rng(0)
    return [
        Question([rng.integers(0, 255, (40, 60, 3), np.uint8) for _ in range(images)], "describe a circle", seed)
        for images, seed in ((3, 7), (1, 8), (3, 9), (3, 9))
    ]


@pytest.mark.parametrize("make", [make_llava, make_qwen])
def test_answers_depend_on_the_seed_and_not_on_the_batch(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    pytest.importorskip("torchvision", reason="an extra of stdit-data")
    from stdit_data.curation.captioners.local import LocalCaptioner, load_processor, make_inputs

    folder = str(make(tmp_path / "model"))
    model = LocalCaptioner(folder, temperature=1.0, max_tokens=12)
    together = model(questions())
    assert together == [model([question])[0] for question in questions()]
    assert together[0].text != together[2].text
    assert all(answer.text and not answer.failure for answer in together if not answer.finished)
    inputs = make_inputs(load_processor(folder), folder, questions())
    images = inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["pixel_values"]
    assert len(images) == 3 + 1 + 3 + 3
    images, prompt, seed = questions()[2].images, "describe a circle", 9
    same = [Question(images, prompt, seed), Question(images, prompt, seed + 1)]
    greedy = LocalCaptioner(folder, temperature=0.0, max_tokens=4)(same)
    assert greedy[0].text == greedy[1].text


def test_what_is_no_captioner_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="an extra of stdit-data")
    from transformers import CLIPConfig, T5Config

    for config in (CLIPConfig(), T5Config()):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(
            DataError, match=f"{config.model_type}: a model of kind '{config.model_type}' is no captioner"
        ):
            checked(CaptionStep(model=str(tmp_path / config.model_type)))
    first_only = make_llava(tmp_path / "first", template("<image>", "message.content[:1] + message.content[3:]"))
    with pytest.raises(DataError, match="its chat template takes 1 of 3 images"):
        checked(CaptionStep(model=str(first_only)))
    (tmp_path / "first" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="without a chat template"):
        checked(CaptionStep(model=str(first_only)))
    with pytest.raises(DataError, match="no captioner"):
        checked(CaptionStep(model=str(tmp_path / "none")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/captioner: no such folder.* HF_HUB_OFFLINE is set") as said:
        checked(CaptionStep(model="nobody/captioner"))
    assert "\n" not in str(said.value)


class Server:
    """OpenAI's API, as much of it as is used. It answers by the mean red of the first image."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.statuses: list[int] = []  # of the next answers, instead of success
        self.text = "The video shows a thing."
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "tiny-captioner"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({**body, "key": self.headers["Authorization"]})
                if outer.statuses and (status := outer.statuses.pop(0)) != 200:
                    self.answer(status, {"error": {"message": "At most 1 image(s)\nmay be provided"}})
                    return
                reason = "length" if outer.text.endswith("and") else "stop"
                self.answer(200, {"choices": [{"message": {"content": outer.text}, "finish_reason": reason}]})

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(stores, "_patience", 0.01)
    found = Server()
    yield found
    found.close()


def test_a_server_describes_clips(raw: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    step = checked(CaptionStep(server=server.url, batch=2, size=80))
    assert step.model == "tiny-captioner"
    server.requests.clear()
    server.statuses = [503, 200, 429]
    (tmp_path / "in.csv").write_text(
        f"path,caption,start,end\n{raw}/scenes.mp4,,3,9\n{raw}/good.mp4,a caption,,\n"
        f"{raw}/photo.png,,,\n{raw}/broken.mp4,,,\n"
    )
    out = tmp_path / "out.parquet"
    outcome = run(step, open_rows(str(tmp_path / "in.csv")), str(out), Inline())
    rows = pq.read_table(out).to_pylist()
    assert [row["caption"] for row in rows] == ["A thing.", "a caption", "A thing."]
    assert [row["caption_flag"] for row in rows] == [None] * 3
    assert outcome.rejects == 1
    asked = {len(request["messages"][0]["content"]): request for request in server.requests}
    assert sorted(asked) == [2, 4]  # one image and the prompt; three images and the prompt
    assert len(server.requests) == 4
    video = asked[4]
    assert video["key"] == "Bearer secret"
    assert (video["model"], video["temperature"], video["max_tokens"]) == ("tiny-captioner", 0.2, 320)
    assert "3 images are frames of one video, in chronological order" in video["messages"][0]["content"][-1]["text"]
    pictures = [np.asarray(picture_of(part)) for part in video["messages"][0]["content"][:3]]
    assert [picture.shape for picture in pictures] == [(48, 80, 3)] * 3
    assert np.abs(pictures[0].astype(int) - pictures[2]).mean() > 5


def picture_of(part: dict[str, Any]) -> Image.Image:
    kind, data = part["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_lost_server_ends_in_one_line_and_resumes(raw: Path, tmp_path: Path, server: Server) -> None:
    (tmp_path / "in.csv").write_text(f"path\n{raw}/good.mp4\n{raw}/still.mp4\n{raw}/blurred.mp4\n")
    step = checked(CaptionStep(server=f"{server.url}/v1/", shard_rows=1, batch=1))
    rows, out = open_rows(str(tmp_path / "in.csv")), str(tmp_path / "out.parquet")
    server.statuses = [200, *[500] * 1000]
    with pytest.raises(Unavailable, match=r"the server is lost \(HTTP 500\); finished shards are kept"):
        run(step, rows, out, Inline())
    server.statuses = []
    server.text = "Sorry, I cannot see the video."
    assert run(step, rows, out, Inline()).resumed == 1
    found = pq.read_table(out).to_pylist()
    assert [row["caption_flag"] for row in found] == [None, "refused", "refused"]
    assert [row["path"] for row in flagged(out)] == [str(raw / "still.mp4"), str(raw / "blurred.mp4")]
    # Flagged captions are written again, good ones are kept.
    server.text = "In this video, a texture moves and"
    again = str(tmp_path / "again.parquet")
    run(step, open_rows(out), again, Inline())
    assert [row["caption"] for row in pq.read_table(again).to_pylist()] == ["A thing.", *["A texture moves and"] * 2]
    assert [row["caption_flag"] for row in pq.read_table(again).to_pylist()] == [None, "cut off", "cut off"]
    overwriting = CaptionStep(model=step.model, server=step.server, overwrite=True)
    run(overwriting, open_rows(out), again, Inline())
    assert {row["caption"] for row in pq.read_table(again).to_pylist()} == {"A texture moves and"}


def test_what_a_server_refuses(raw: Path, tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match="does not serve 'other'; it serves tiny-captioner"):
        checked(CaptionStep(server=server.url, model="other"))
    server.statuses = [400]
    with pytest.raises(DataError, match=r"takes no three images .*At most 1 image"):
        checked(CaptionStep(server=server.url))
    step = checked(CaptionStep(server=server.url, batch=1))
    (tmp_path / "in.csv").write_text(f"path\n{raw}/good.mp4\n{raw}/still.mp4\n")
    rows, out = open_rows(str(tmp_path / "in.csv")), str(tmp_path / "out.parquet")
    server.statuses = [401]
    with pytest.raises(Unavailable, match="HTTP 401"):
        run(step, rows, out, Inline())
    server.statuses = [413]
    outcome = run(step, rows, out, Inline())
    assert (outcome.rows, outcome.rejects) == (1, 1)
    assert "refused by the server: HTTP 413" in (tmp_path / "out.rejects.jsonl").read_text()
    server.close()
    with pytest.raises(DataError, match="the server is lost"):
        checked(CaptionStep(server=server.url))
    with pytest.raises(DataError, match="expected a URL"):
        base_url("localhost:8000")
