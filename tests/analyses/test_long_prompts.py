"""What attention by source costs on long prompts."""

import json
from collections import Counter

import long_prompts
import pytest
import torch

import icl_dual as icl


@pytest.mark.parametrize("n_tokens", [400, 1003])
def test_a_prompt_has_as_many_tokens_as_it_should_and_documents_of_like_lengths(few_layers: str, n_tokens: int) -> None:
    prompt = long_prompts.prompt_of(icl.load_model(few_layers), icl.load_task("agnews"), n_tokens)
    assert len(prompt) == n_tokens
    lengths = Counter(prompt.names[source] for source in prompt.sources)
    of_documents = [lengths[name] for name in long_prompts.DOCUMENTS]
    assert max(of_documents) - min(of_documents) <= 1
    assert prompt.text.endswith(long_prompts.QUESTION)
    first = "".join(prompt.texts[token] for token in range(*prompt.spans("document 1")[0]))
    assert first.startswith(icl.load_task("agnews").queries(1)[0].fields[0][1][:100])


def test_the_plain_pass_is_the_model_and_every_run_is_measured(
    few_layers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = icl.load_model(few_layers)
    prompt = icl.prompt_from_text("The box is red.", {"box": "box"}, model)
    logits = long_prompts.plain_pass(few_layers)(prompt).logits[0, -1]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        hooked = model.wrapped(torch.tensor([prompt.tokens]))[0, -1]
    torch.testing.assert_close(logits, hooked, rtol=1e-4, atol=1e-4)
    n_threads = torch.get_num_threads()
    try:
        for run in long_prompts.RUNS:
            assert long_prompts.main(["--model", few_layers, "--tokens", "300", "--run", run]) == 0
            measured = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert measured["processor s"] > 0
            assert measured["memory, MB"] >= 0
    finally:
        torch.set_num_threads(n_threads)
