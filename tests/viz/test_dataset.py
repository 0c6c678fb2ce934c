from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError, MissingExtraError, SampleError
from llava_scale.model.build import build_model, build_processor, load_processor
from llava_scale.viz.dataset import ModelSide, choose_samples, view_tokens, write_samples_page
from llava_scale.viz.dataset_stats import PackingOptions, collect_stats, summary_rows, write_stats_page


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """One, two and no pictures; odd samples have two answers; the last of 12 is very long."""
    root = tmp_path_factory.mktemp("samples")
    (root / "media").mkdir()
    records = []
    for i in range(12):
        for name in (f"{i}.png", f"{i}b.png"):
            Image.new("RGB", (40, 20 + i), (20 * i, 0, 0)).save(root / "media" / name)
        turns = [{"from": "human", "value": "What is <b>here?"}, {"from": "gpt", "value": "A red é square."}]
        turns += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Blue."}] if i % 2 else []
        record = {"id": f"k/{i}", "conversations": turns, "task": "color"}
        if i % 4:
            record["image"] = f"{i}.png" if i % 4 < 3 else [f"{i}.png", f"{i}b.png"]
        records.append(record)
    records[-1]["conversations"][1]["value"] = "long " * 300
    (root / "data.json").write_text(json.dumps(records))
    pack(root / "data.json", root / "shards", media_root=root / "media", shard_size=5, workers=1)
    return open_dataset(str(root / "shards"), cache_dir=str(root / "cache"))


@pytest.fixture(scope="module")
def tiny():
    processor = build_processor(ModelConfig(preset="tiny"), chat_template="native")
    return ModelSide(
        name="tiny",
        encoder=processor.chat_encoder,
        counter=processor.token_counter,
        transform=processor.image_transform,
        row_length=512,
    )


def test_samples_are_spread_over_the_data_set_or_chosen_by_key(dataset):
    assert choose_samples(dataset, 3) == [0, 6, 11] or choose_samples(dataset, 3) == [0, 5, 11]
    assert choose_samples(dataset, 99) == list(range(12))
    assert [dataset.key(number) for number in choose_samples(dataset, 1, ["k/7", "k/2"])] == ["k/7", "k/2"]
    with pytest.raises(ConfigError, match="no sample with the key 'k/99'"):
        choose_samples(dataset, 1, ["k/99"])


def test_the_tokens_of_a_sample_are_those_of_training(dataset, tiny):
    number = choose_samples(dataset, 1, ["k/3"])[0]
    sample = dataset.sample(number)
    views = view_tokens(sample, dataset.media_infos(number), tiny)
    encoded = tiny.encoder.encode(sample.turns)
    assert [view.token_id for view in views] == encoded.input_ids
    assert [view.is_supervised for view in views] == encoded.supervised
    spans = [view for view in views if view.kind]
    assert [(view.kind, view.ordinal) for view in spans] == [("image", 1), ("image", 2)]
    wanted = tiny.counter.count(dataset.media_infos(number)[0], step=None)
    assert {(view.num_tokens, view.grid) for view in spans} == {(wanted.num_tokens, wanted.grid)}
    assert "A red é square." in "".join(view.text for view in views)


def test_a_sample_longer_than_a_row_is_told(dataset, tiny):
    with pytest.raises(SampleError, match=r"tokens do not fit in a row of 512"):
        view_tokens(dataset.sample(11), dataset.media_infos(11), tiny)


def test_the_page_shows_pictures_before_and_after_tokens_and_what_cannot_be_used(dataset, tiny, tmp_path):
    page = write_samples_page(dataset, choose_samples(dataset, 12), tmp_path / "deep" / "samples.html", tiny)
    html = page.read_text()
    assert html.count('class="card sample"') == 11
    assert html.count("cannot be used: ") == 1
    size = tiny.transform.size
    assert (
        html.count(f"<figcaption>as the model sees it · {size}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{size}")
        == 3 + 3 + 2 * 2
    )
    shown = re.sub(r"<[^>]*>", "", html)
    assert "image 2 · " in shown
    assert "What is &lt;b&gt;here?" in shown
    assert re.search(r'class="t on"[^>]*>[^<]*square', html)
    assert not re.search(r'class="t on"[^>]*>[^<]*here', html)
    assert "k/10" in html
    assert "task color" in html
    assert 'src="http' not in html
    assert "<script" not in html


def test_the_page_needs_no_model(dataset, tmp_path):
    html = write_samples_page(dataset, [0, 1], tmp_path / "samples.html", ModelSide()).read_text()
    assert '<span class="said on">A red é square.</span>' in html
    assert '<span class="span">image</span>' in html
    assert "as the model sees it" not in html


def test_a_damaged_picture_is_shown_with_its_reason(dataset, tiny, tmp_path):
    target = tmp_path / "shards"
    target.mkdir()
    entry = dataset.index(0).entry(1)
    data = bytearray((type(target)(dataset.path) / dataset.shard_name(0)).read_bytes())
    medium = entry.media[0]
    data[medium.offset + 40 : medium.offset + medium.size] = bytes(medium.size - 40)
    (target / "shard-00000.tar").write_bytes(data)
    damaged = open_dataset(str(target), cache_dir=str(tmp_path / "cache"))
    html = write_samples_page(damaged, [1], tmp_path / "samples.html", tiny).read_text()
    assert re.search(r"cannot be used: (damaged PNG|unreadable|not a readable) picture", html)


def test_stats_count_what_the_data_set_holds(dataset, tiny):
    seen = []
    stats = collect_stats(
        dataset,
        tiny,
        packing=PackingOptions(row_length=512, lookahead_rows=4),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (12, 12)
    assert stats.mixes == {"text only": 3, "image": 6, "2 images": 3}
    assert stats.answers == [1, 2] * 6
    assert len(stats.picture_sizes) == 12
    assert stats.picture_sizes[0] == (40, 21)
    lengths = [
        sum(view.num_tokens for view in view_tokens(dataset.sample(i), dataset.media_infos(i), tiny)) for i in range(11)
    ]
    assert stats.tokens[:11] == lengths
    assert stats.num_too_long == 1
    assert sum(stats.row_fill) * 512 == pytest.approx(sum(lengths))
    rows = dict(summary_rows(stats))
    assert rows["answers a sample"] == pytest.approx([1.5, 1, 1.5, 2, 2])


def test_cut_samples_fill_a_whole_row(dataset, tiny):
    options = PackingOptions(row_length=512, lookahead_rows=4, truncate=True)
    stats = collect_stats(dataset, tiny, packing=options)
    assert sum(stats.row_fill) * 512 == pytest.approx(sum(stats.tokens[:11]) + 512)
    assert max(stats.row_fill) == 1.0


def test_stats_write_one_page_and_its_diagrams(dataset, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    page = write_stats_page(
        collect_stats(dataset, tiny, packing=PackingOptions(row_length=512, lookahead_rows=4)), tmp_path / "out"
    )
    names = {path.stem for path in page.parent.glob("*.png")}
    assert names == {"modalities", "text_chars", "tokens", "supervised", "turns", "picture_sizes", "row_fill"}
    for path in page.parent.glob("*.png"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.width > 800
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 7
    without = write_stats_page(collect_stats(dataset, ModelSide(), limit=3), tmp_path / "plain")
    assert not (without.parent / "tokens.png").exists()


def test_stats_list_samples_that_cannot_be_used(dataset, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(type(dataset), "turns", lambda self, i: (_ for _ in ()).throw(SampleError("empty answer")))
    stats = collect_stats(dataset, ModelSide())
    assert len(stats.bad) == 12
    html = write_stats_page(stats, tmp_path).read_text()
    assert "empty answer" in html


def test_diagrams_without_matplotlib_name_the_extra(dataset, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"llava-scale\[plot\]"):
        write_stats_page(collect_stats(dataset, ModelSide()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_processor_is_the_one_that_the_model_would_have(tmp_path):
    model, whole = build_model(ModelConfig(preset="tiny"), chat_template="plain", seed=0)
    alone = build_processor(ModelConfig(preset="tiny"), chat_template="plain")
    assert alone.image_transform == whole.image_transform
    assert alone.token_counter == whole.token_counter
    assert alone.chat_encoder.fingerprint() == whole.chat_encoder.fingerprint()
    model.save_pretrained(tmp_path)
    whole.save_pretrained(tmp_path)
    assert load_processor(tmp_path).chat_encoder.fingerprint() == whole.chat_encoder.fingerprint()
    other = build_processor(ModelConfig(init_from=str(tmp_path)), chat_template="native")
    assert other.chat_encoder.template == "native"
    assert other.token_counter == whole.token_counter
