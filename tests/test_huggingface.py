"""A checkpoint is an ordinary model of transformers, with and without this package."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import real_dialogues, saved
from hub import hub
from new_llm import cli
from new_llm.checkpoint import TRAVELLING, load_checkpoint
from new_llm.config import to_dict
from new_llm.export import Step
from new_llm.model import NewLLM
from test_project import SOURCE

CELLS = {"convex": {}, "layerwise": {}, "token scope": {"scope": "token", "num_blocks": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("hf") / "checkpoint")


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer


def logits(model: NewLLM, ids: Tensor) -> Tensor:
    return model.logits(model(ids).features)


@pytest.mark.parametrize("kind", CELLS)
@torch.no_grad()
def test_logits_are_those_of_our_model(kind: str, tmp_path: Path) -> None:
    cell = "convex" if kind == "token scope" else kind
    path = saved(tmp_path / "c", cell=cell, **CELLS[kind])
    model, _ = loaded(path)
    ids = torch.randint(400, (2, 9))
    expected = logits(load_checkpoint(path).model, ids)
    assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@torch.no_grad()
def test_auto_classes_know_what_a_checkpoint_is(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    ours = load_checkpoint(folder)
    assert config.model == to_dict(ours.model.config)
    assert config.vocab_size == ours.tokenizer.vocab_size
    found = AutoModel.from_pretrained(folder).eval()(torch.tensor([[3, 1, 4]]))
    expected = ours.model(torch.tensor([[3, 1, 4]]))
    assert torch.allclose(found.last_hidden_state, expected.features, atol=1e-6)
    states = [layer.recurrent_states[0] for layer in found.cache.layers]
    assert torch.allclose(torch.stack(states, dim=1), expected.context, atol=1e-6)


def test_text_becomes_the_same_ids(folder: Path) -> None:
    _, tokenizer = loaded(folder)
    ours = load_checkpoint(folder).tokenizer
    (messages,) = real_dialogues(1)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == ours.encode_prompt(messages)
    assert tokenizer.eos_token_id == ours.im_end_id


@torch.no_grad()
def test_padded_prompts_are_continued_as_alone(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    prompts = ["hello", "how are you today my friend", "I"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    options: Any = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)
    for prompt, found in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = model.generate(ids, **options)[0]
        assert found[-len(alone) :].tolist() == alone.tolist()
        # what is generated is what our own model says, token by token
        said = alone.tolist()
        for at in range(ids.shape[1], len(said)):
            (last,) = logits(load_checkpoint(folder).model, alone[None, :at])[:, -1]
            assert int(last.argmax()) == said[at]


@torch.no_grad()
def test_a_returned_cache_is_continued(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    ids = tokenizer("hello, how are you", return_tensors="pt").input_ids
    options: Any = {"do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, max_new_tokens=10, **options)
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **options)
    # the last token was said, but not read yet
    again = model.generate(first.sequences, cache=first.cache, max_new_tokens=6, **options)
    assert again.tolist() == whole.tolist()


@torch.no_grad()
def test_beams_keep_their_own_contexts(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    ids = tokenizer("hello, how are", return_tensors="pt").input_ids
    options: Any = {"max_new_tokens": 6, "num_beams": 4, "eos_token_id": None, "do_sample": False}
    with_cache = model.generate(ids, **options)
    without = model.generate(ids, use_cache=False, **options)
    assert with_cache.tolist() == without.tolist()
    assert with_cache.tolist() != model.generate(ids, **options | {"num_beams": 1}).tolist()


@torch.no_grad()
def test_sampling_and_stop_strings(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    ids = tokenizer("hello", return_tensors="pt").input_ids

    def sampled(**options: Any) -> Tensor:
        torch.manual_seed(1)
        return model.generate(ids, do_sample=True, top_k=20, eos_token_id=None, **options)[0]

    whole = sampled(max_new_tokens=30)
    assert sampled(max_new_tokens=30).tolist() == whole.tolist()
    said = [tokenizer.decode(token) for token in whole[ids.shape[1] :]]
    stop = next(text for text in said[3:] if text.strip())
    stopped = sampled(max_new_tokens=30, stop_strings=[stop], tokenizer=tokenizer)
    assert len(stopped) < len(whole) and whole.tolist()[: len(stopped)] == stopped.tolist()


def test_a_pipeline_chats(folder: Path) -> None:
    from transformers import pipeline

    speaker = pipeline("text-generation", model=str(folder), tokenizer=str(folder))
    messages = [{"role": "user", "content": "hello"}]
    (answer,) = speaker(messages, max_new_tokens=5, do_sample=False)
    *before, said = answer["generated_text"]
    assert before == messages and said["role"] == "assistant" and said["content"]


@torch.no_grad()
def test_embeddings_stand_for_ids(folder: Path) -> None:
    model, _ = loaded(folder)
    ids = torch.randint(400, (2, 5))
    rows = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=rows).logits, model(ids).logits)
    with pytest.raises(ValueError, match="got both or none"):
        model(ids, inputs_embeds=rows)


def test_the_loss_is_that_of_shifted_labels(folder: Path) -> None:
    model, _ = loaded(folder)
    ids = torch.randint(400, (2, 7))
    labels = ids.clone()
    labels[0, 3] = -100
    output = model(ids, labels=labels)
    nats = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert output.loss.item() == pytest.approx(nats.item(), abs=1e-5)
    assert model.train()(ids).cache is None


def test_checkpointed_blocks_have_the_same_gradients(folder: Path) -> None:
    gradients = []
    for asked in (False, True):
        model, _ = loaded(folder)
        model.train()
        if asked:
            model.activation_checkpointing_enable()
        ids = torch.arange(24).reshape(2, 12)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.model.network.gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@torch.no_grad()
def test_what_transformers_saves_we_load(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder)
    model.get_input_embeddings().weight.mul_(1.1)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    ids = torch.randint(400, (1, 6))
    ours = load_checkpoint(tmp_path / "again").model
    theirs, _ = loaded(tmp_path / "again")
    assert torch.allclose(logits(ours, ids), model(ids).logits, atol=1e-6)
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-6)
    assert not torch.allclose(logits(load_checkpoint(folder).model, ids), model(ids).logits)


def test_what_travels_is_closed_and_stands_on_little() -> None:
    for name in TRAVELLING:
        for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in TRAVELLING, f"{name}: {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
                    alias.name for alias in node.names]  # fmt: skip
                for whole in names:
                    root = whole.partition(".")[0]
                    known = root in sys.stdlib_module_names
                    assert known or root in ("torch", "transformers", "safetensors"), whole


def run_alone(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


@torch.no_grad()
def test_a_checkpoint_works_without_the_package(folder: Path, tmp_path: Path) -> None:
    code = f"""
        import json, sys
        sys.modules["new_llm"] = None  # any import of it fails
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
        ids = tokenizer("hello there", return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=5, do_sample=False)
        answer = pipeline("text-generation", model=model, tokenizer=tokenizer)("hello")
        model.save_pretrained({str(tmp_path / "again")!r})
        tokenizer.save_pretrained({str(tmp_path / "again")!r})
        print(json.dumps([ids.tolist(), model(ids).logits[0, -1].tolist(), said.tolist()]))
    """
    printed = run_alone(code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    ids, last, said = json.loads(printed.splitlines()[-1])
    model, _ = loaded(folder)
    assert torch.allclose(model(torch.tensor(ids)).logits[0, -1], torch.tensor(last), atol=1e-5)
    expected = model.generate(torch.tensor(ids), max_new_tokens=5, do_sample=False)
    assert said == expected.tolist()
    # saved there, it travels on with its code, and is ours again here
    assert (tmp_path / "again" / "modeling_new_llm.py").is_file()
    again = load_checkpoint(tmp_path / "again").model
    assert torch.allclose(logits(again, torch.tensor(ids))[0, -1], torch.tensor(last), atol=1e-5)


@pytest.mark.parametrize("first", ["new_llm", "transformers"])
def test_transformers_learns_of_us_whichever_is_imported_first(first: str, folder: Path) -> None:
    second = {"new_llm": "transformers", "transformers": "new_llm"}[first]
    code = f"""
        import sys
        import {first}
        if {first!r} == "new_llm":
            assert not {{"torch", "transformers"}} & set(sys.modules)
        import {second}
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__module__)
    """
    assert run_alone(code).splitlines()[-1] == "new_llm.modeling_new_llm"


def test_what_is_pushed_to_a_hub_loads_without_the_package(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 1, 4, 1]])
    model, _ = loaded(folder)
    expected = model(ids).logits[0, -1]
    with hub() as served:
        home = {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}  # fmt: skip
        run_alone(f"""
            import new_llm
            from transformers import AutoModelForCausalLM, AutoTokenizer
            AutoModelForCausalLM.from_pretrained({str(folder)!r}).push_to_hub("me/pushed")
            AutoTokenizer.from_pretrained({str(folder)!r}).push_to_hub("me/pushed")
        """, **home)  # fmt: skip
        command = [str(Path(sys.executable).with_name("hf")), "upload", "me/uploaded", str(folder)]
        subprocess.run(command, env=os.environ | home, check=True, capture_output=True)
        # the card and the code travel with the weights
        uploaded = served.repositories["me/uploaded"]
        assert uploaded["README.md"] == (folder / "README.md").read_bytes()
        assert served.tokens == {"Bearer hf_mine"}
        for name in ("me/pushed", "me/uploaded"):
            printed = run_alone(f"""
                import json, sys
                sys.modules["new_llm"] = None
                import torch
                from transformers import AutoModelForCausalLM, AutoTokenizer
                model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)
                tokenizer = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)
                assert tokenizer.chat_template and tokenizer("hello").input_ids
                print(json.dumps(model(torch.tensor({ids.tolist()})).logits[0, -1].tolist()))
            """, **home)  # fmt: skip
            found = torch.tensor(json.loads(printed.splitlines()[-1]))
            assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_it_runs_in_bfloat16_where_a_device_map_says(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded(folder)
    low: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert low.dtype == torch.bfloat16 and low.device.type == "cpu"
    ids = tokenizer("hello, how are you", return_tensors="pt").input_ids
    exact, found = model(ids).logits, low(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() / exact.norm() < 0.05
    assert low.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile needs g++")
def test_a_compiled_model_says_the_same(folder: Path) -> None:
    # alone: PyTorch's compiler warns of itself, and is not whole where a warning is an error
    run_alone(f"""
        import torch
        import new_llm
        from new_llm.export import Step
        from transformers import AutoModelForCausalLM
        torch.set_grad_enabled(False)
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()
        ids = torch.randint(400, (2, 7))
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model)
        assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-4)
        step = torch.compile(Step(model.model.network), fullgraph=True)
        context = model.model.network.initial_context(2)
        for place in range(ids.shape[1]):
            logits, context = step(ids[:, place], context)
            assert torch.allclose(logits, expected[:, place], atol=1e-4)
    """, OMP_NUM_THREADS="1")  # fmt: skip


@torch.no_grad()
def test_one_step_is_exported_as_one_graph(folder: Path, tmp_path: Path) -> None:
    network = loaded(folder)[0].model.network
    step, context = Step(network), network.initial_context(3)
    batch = torch.export.Dim("batch", min=1)
    shapes = {"token": {0: batch}, "context": {0: batch}}
    program = torch.export.export(step, (torch.tensor([3, 4, 5]), context), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "step.pt2")
    again = torch.export.load(tmp_path / "step.pt2").module()
    for batch_size in (1, 2, 5):
        token, context = torch.randint(400, (batch_size,)), torch.randn(batch_size, 2, 16)
        for one, other in zip(step(token, context), again(token, context), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("cell", ["convex", "layerwise"])
def test_a_step_as_onnx_says_the_same(
    cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    import onnxruntime

    path = saved(tmp_path / "c", cell=cell)
    out = tmp_path / "onnx"
    assert cli.main(["export", str(path), "--out", str(out)]) == 0
    assert "largest relative difference of onnxruntime" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out / "step.onnx"))
    about, ours = json.loads((out / "step.json").read_text()), load_checkpoint(path)
    assert about["largest_relative_difference"] <= 1e-4
    ids = ours.tokenizer.encode("hello, how are you")
    context = np.zeros([1, *about["inputs"]["context"][1:]], dtype=np.float32)
    with torch.no_grad():
        expected = logits(ours.model, torch.tensor([ids]))[0]
    for token, wanted in zip(ids, expected, strict=True):
        given = {"token": np.array([token]), "context": context}
        found, context = map(np.asarray, session.run(None, given))
        assert np.allclose(found[0], wanted.numpy(), atol=1e-4)
    # a folder that holds something is left alone
    assert cli.main(["export", str(path), "--out", str(out)]) == 2
    assert "a new or empty folder expected" in capsys.readouterr().err


def test_token_scope_has_no_step_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "c", scope="token", num_blocks=1)
    assert cli.main(["export", str(path), "--out", str(tmp_path / "onnx")]) == 2
    assert "sequence scope expected" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.ultrachat
def test_trainer_lowers_the_loss_and_a_reload_says_the_same(
    folder: Path, ultrachat: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer = loaded(folder)
    tokenizer.padding_side = "right"
    rows = [json.loads(line) for line in (ultrachat / "valid.jsonl").read_text().splitlines()[:64]]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = [tokenizer(text, truncation=True, max_length=64) for text in texts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=50, per_device_train_batch_size=8, learning_rate=1e-2,
        logging_steps=10, report_to=[], save_strategy="no", use_cpu=True,
        activation_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(one) for one in encoded]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    trainer.save_model(str(tmp_path / "tuned"))
    tokenizer.save_pretrained(tmp_path / "tuned")
    ids = torch.randint(400, (1, 6))
    model.eval()
    assert torch.allclose(loaded(tmp_path / "tuned")[0](ids).logits, model(ids).logits, atol=1e-6)
