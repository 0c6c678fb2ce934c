from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.model import build_model, load_model

RED, BLUE = Image.new("RGB", (30, 50), "red"), Image.new("RGB", (40, 40), "blue")


@pytest.fixture(scope="module")
def lively():
    """A random model whose next token depends strongly on what came before."""
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(4.0)
    return model, processor


def generated(model, inputs, num=8, **kwargs):
    """New token ids of each row."""
    kwargs = {"do_sample": False, "max_new_tokens": num, "min_new_tokens": num, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()


def test_the_cache_changes_nothing(lively):
    model, processor = lively
    inputs = processor("<image> what color ?", images=RED)
    answer = generated(model, inputs)
    assert len(set(answer[0])) > 1
    assert generated(model, inputs, use_cache=False) == answer


def test_pictures_go_through_the_tower_once(lively):
    model, processor = lively
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generated(model, processor("<image> what color ?", images=RED))
    hook.remove()
    assert calls == [1]


def test_the_answer_depends_on_the_picture(lively):
    model, processor = lively
    answers = [generated(model, processor("<image> what color ?", images=picture)) for picture in (RED, BLUE)]
    assert answers[0] != answers[1]


def test_a_batch_gives_what_its_prompts_give_alone(lively):
    model, processor = lively
    prompts = ["<image> what color ?", "<image> and <image> which is it ?", "hello"]
    batch = processor(prompts, images=[RED, BLUE, RED])
    alone = [
        generated(model, processor(prompt, images=images))[0]
        for prompt, images in zip(prompts, ([RED], [BLUE, RED], None), strict=True)
    ]
    assert generated(model, batch) == alone


def test_several_answers_keep_each_prompt_with_its_own_pictures(lively):
    model, processor = lively
    prompts = ["<image> and <image> which is it ?", "<image> what color ?"]
    batch = processor(prompts, images=[RED, BLUE, BLUE])
    singles = generated(model, batch, num_beams=1)
    copies = generated(model, batch, num_return_sequences=3, num_beams=3, num_beam_groups=None)
    assert len(copies) == 6
    alone = [
        generated(model, processor(prompt, images=images), num_return_sequences=3, num_beams=3)
        for prompt, images in zip(prompts, ([RED, BLUE], [BLUE]), strict=True)
    ]
    assert copies == alone[0] + alone[1]
    assert singles == [generated(model, processor(prompts[0], images=[RED, BLUE]))[0], singles[1]]


def test_a_loaded_checkpoint_gives_the_same_tokens(lively, tmp_path):
    model, processor = lively
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = load_model(tmp_path)
    text = "<image> what color ?"
    assert generated(loaded, its_processor(text, images=RED)) == generated(model, processor(text, images=RED))


def test_placeholders_are_never_generated(lively):
    model, processor = lively
    ids = [model.config.image_token_id, model.config.video_token_id, model.config.audio_token_id]
    assert model.generation_config.suppress_tokens == ids
    head = model.get_output_embeddings()
    favoured = head.weight.detach().clone()
    with torch.no_grad():
        head.weight[ids[0]] *= 100
    answers = generated(model, processor("hello", None), do_sample=True, num=20)
    with torch.no_grad():
        head.weight.copy_(favoured)
    assert not set(answers[0]) & set(ids)


def test_generation_ends_where_training_ended_an_answer(lively):
    model, processor = lively
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == [end]
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id != end
