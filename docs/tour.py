# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour in one notebook
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# A language model that reads a few examples of a task answers the next one better. Nothing in its weights changes. [Dai
# et al. (2023)](https://aclanthology.org/2023.findings-acl.247) say that this *in-context learning* is finetuning in
# disguise: attention to the examples acts as a change of weights by gradient descent would. This notebook goes through
# the argument and its tests on a real model, SmolLM2-135M-Instruct, in about two minutes on two CPU cores:
#
# 1. a linear layer, where the claim is a theorem;
# 2. one prompt, and which of its parts a head reads;
# 3. a task in three settings: zero-shot, in context, finetuned;
# 4. the paper's metrics, and what they are compared with;
# 5. what attention to the demonstrations adds, at every layer and head;
# 6. the two changes of weights, compared as matrices;
# 7. a context written into the weights, exactly;
# 8. momentum attention.
#
# The numbers are those of a few queries of one task. They show how to use the library; the results are in
# [Findings](findings.md).
#
# The library must be installed where the notebook runs: `pip install -c constraints.txt -e .` in a clone. On Colab, the
# badge opens the list of notebooks of a GitHub repository. Build a wheel in the clone with `pip wheel . --no-deps`,
# upload it, and `%pip install` it in a first cell.

# %%
import matplotlib.pyplot as plt
import torch

import icl_dual as icl
from icl_dual.momentum import momentum_linear_attention

icl.set_progress(False)  # no progress bars, which would be in the notebook's output

# %% [markdown]
# ## 1. A linear layer: learning is attention
#
# A layer $W_0$ is trained by gradient descent, one example at a time. Step $i$ adds the outer product of an error
# signal $e_i$ and the input $x_i$. So the trained layer's output for a new input $x$ is the untrained output plus a sum
# over the training examples, each weighted by the dot product of its input with $x$:
#
# $$W x = W_0 x + \sum_i e_i \, (x_i^\top x)$$
#
# The sum is attention without a softmax: the training inputs are the keys, the error signals the values, and $x$ is the
# query. Train a layer, and compute its output both ways:

# %%
generator = torch.Generator().manual_seed(0)
W_0 = torch.randn(3, 5, generator=generator, dtype=torch.float64)
inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
targets = torch.randn(20, 3, generator=generator, dtype=torch.float64)
x = torch.randn(1, 5, generator=generator, dtype=torch.float64)


def gradient(output, step):
    """Return the gradient of the squared error ½‖output − target‖² with respect to the output."""
    return output - targets[step]


W, errors = icl.dual.sgd(W_0, inputs, gradient, lr=0.05)
by_trained_layer = x @ W.T
by_attention = x @ W_0.T + icl.dual.linear_attention(q=x, k=inputs, v=errors)
print("trained layer:            ", by_trained_layer.numpy().round(6))
print("untrained, plus attention:", by_attention.numpy().round(6))
print("equal up to rounding:", torch.allclose(by_trained_layer, by_attention, rtol=0, atol=1e-12))

# %% [markdown]
# The paper reads this backwards: attention to demonstrations *is* a change of weights, with values for error signals.
# That holds for attention without a softmax. Models have one, the values were not made by any loss, and there are 30
# layers. How much of the picture is left is a question for measurements.
#
# ## 2. One prompt: which part does a head read?
#
# A prompt of three documents and a question. The library runs the model once and splits every head's output by the
# source of what it reads. The parts add up to the model's own attention output.

# %%
model = icl.load_model("smollm2-135m")
documents = {
    "document 1": "Document: Elena works as a doctor and lives in Boston.\n",
    "document 2": "Document: Simon works as a dentist and lives in Madrid.\n",
    "document 3": "Document: Carla works as a pilot and lives in Lisbon.\n",
}
question = "Question: Where does Simon live?\nAnswer: Simon lives in"
prompt = icl.prompt_from_parts([*documents.items(), ("question", question)], model)
answer = model.encode(" Madrid")[0]
sources = icl.capture_sources(model, prompt, logits=[answer])
print("the parts sum to the model's own output:", bool(sources.residual < 1e-5))

# %% [markdown]
# What each part adds to the logit of *Madrid*, summed over the heads of a layer. The document with the answer stands
# out, in the upper layers:

# %%
icl.plots.sources(sources, "logit_effect")
plt.show()

# %% [markdown]
# The head that adds most on its behalf, token by token. Blue tokens raise the answer's logit through this head:

# %%
effect = sources.logit_effect[0, 0, ..., sources.source_index("document 2"), 0]
layer, head = divmod(int(effect.argmax()), model.n_heads)
tokens = icl.capture_sources(model, prompt.by_token(), layers=[layer], logits=[answer])
print(f"layer {layer}, head {head}")
icl.plots.source_tokens(tokens.show(layer, head, quantity="logit_effect"))
plt.show()

# %% [markdown]
# ## 3. A task in three settings
#
# Is a sentence objective or subjective? The three settings share one template and one set of demonstrations:
#
# | setting | weights | prompt |
# |---|---|---|
# | zero-shot (ZSL) | the model's own | the query alone |
# | in-context learning (ICL) | the model's own | four demonstrations, then the query |
# | finetuned (FT) | keys and values trained on the same demonstrations | the query alone |
#
# `run_experiment` runs all three and the finetuning. A prompt first, to see what the model reads:

# %%
task = icl.load_task("subj")
demonstrations, queries = task.demonstrations(k=4, seed=2), task.queries(16)
prompts = icl.build_prompts(model, task, demonstrations, queries)
for example in [*demonstrations, queries[0]]:
    print(task.prompt(example), task.label_words[example.label])

# %%
fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS  # what to keep: for metrics, and for the decomposition
experiment = icl.run_experiment(model, prompts, lr=0.05, fields=fields, replicas=0)  # without replicas, to be quick
print(experiment)

# %% [markdown]
# ## 4. The metrics, and what they are compared with
#
# *SimAOU* asks whether in-context learning and finetuning change a layer's attention output in the same direction: 1 is
# the same direction, 0 is none in common. *SimAM* compares attention within the query, *Kendall* attention to the
# demonstrations. *Rec2FTP* is the share of finetuning's corrected answers that in-context learning gets right, too.
# Each row has what it is held against:

# %%
comparison = experiment.compare()
comparison

# %% [markdown]
# SimAOU by layer, with its baselines. It scales outputs to length 1 before it subtracts, so that even two unrelated
# random updates score above zero. That is one of the lines:

# %%
icl.plots.layers(comparison, "SimAOU")
plt.show()

# %% [markdown]
# Is a high score evidence that demonstrations are learned from? Two controls should score lower if so. With **flipped
# labels** in context, every demonstration is wrong; finetuning still has the right ones. An **untrained** model of the
# same shape has learned nothing at all:

# %%
flipped = icl.relabel(demonstrations, "flipped labels", len(task.label_words), seed=1)
flipped_prompts = icl.build_prompts(model, task, flipped, queries)
in_flipped_context = icl.capture(model, flipped_prompts)
with_flipped_labels = icl.compare(
    zero_shot=experiment.zero_shot, in_context=in_flipped_context, finetuned=experiment.finetuned
)

untrained = icl.control_model(model, "untrained", seed=1)
without_training = icl.run_experiment(untrained, prompts.first(8), lr=0.05, replicas=0)

comparisons = {
    "right labels": comparison,
    "flipped labels": with_flipped_labels,
    "untrained model": without_training.compare(),
}
rows = {name: {"SimAOU": compared.intervals()["SimAOU"]} for name, compared in comparisons.items()}
icl.plots.dots(rows).set_xlabel("SimAOU (cosine)")
plt.show()

# %% [markdown]
# Flipped labels leave the score where it was, and the untrained model scores higher. More queries, tasks and seeds say
# the same ([Findings](findings.md#controls)): SimAOU does not show that a model learns from its demonstrations.
#
# ## 5. What attention to the demonstrations adds
#
# Attention splits without any approximation. Let $w$ be the share of the softmax that goes to the demonstrations, and
# $z_0$ attention over everything else:
#
# $$z = z_0 + \Delta_\mathrm{ICL}, \qquad \Delta_\mathrm{ICL} = w \, (z_\mathrm{demo} - z_0)$$

# %%
decomposition = experiment.decompose()
print("z = z_0 + ΔICL at every layer and head:", bool(decomposition.residual < 1e-5))
decomposition

# %% [markdown]
# One query of it, token by token: choose a layer and a head in the grid. A notebook shows the view where it is trusted.
# [Interactive view](view.md) has a picture, and says how to read it.

# %%
icl.view(decomposition, query=0, zero_shot=experiment.zero_shot)

# %% [markdown]
# The share of the softmax on demonstrations at every layer and head:

# %%
icl.plots.heads(decomposition.demonstration_mass, label="share of the softmax on demonstrations")
plt.show()

# %% [markdown]
# From zero-shot to in context, a layer's output changes for two reasons: its own attention to the demonstrations
# (*direct*), and lower layers that had already changed what it reads (*inherited*). Layer 0 inherits nothing. Above it,
# the inherited part is the larger one on average:

# %%
icl.plots.by_layer(
    {"direct": decomposition.direct_share, "inherited": decomposition.inherited_share},
    ylabel="share of the change of output",
)
plt.show()

# %% [markdown]
# ## 6. The two changes of weights
#
# Without the softmax, the demonstrations are a change of weights, $\Delta W_\mathrm{ICL} = \sum_i v_i \otimes k_i$
# (equation 12 of the paper). Finetuning has $\Delta W_\mathrm{FT}$ (equation 13). The paper never compares the two
# matrices. Their cosine, and that of random directions:

# %%
updates = experiment.updates()
icl.plots.against_null(updates.cosine, updates.cosine_random)
plt.show()

# %% [markdown]
# The matrices have something in common, though little. But does $\Delta W_\mathrm{ICL}$ do what the demonstrations do?
# The paper drops the softmax on the way to it. Here is the cosine of $\Delta W_\mathrm{ICL} q$ with the exact
# $\Delta_\mathrm{ICL}$; 1 would be the same direction:

# %%
icl.plots.heads(decomposition.relaxation.update_cosine, label="cos(ΔW_ICL q, ΔICL)", limits=(-1, 1))
plt.show()

# %% [markdown]
# ## 7. A context as a change of weights, exactly
#
# There is a change of weights that does exactly what the demonstrations do, for one query: it changes MLPs, not
# attention. Run the query *without* demonstrations in the patched model, and compare with the in-context logits:

# %%
patch = icl.build_exact_patch(model, prompts, query=0)
in_context, alone = torch.tensor([patch.prompt]), torch.tensor([patch.query])
with torch.no_grad():
    expected, unpatched = model.run(in_context)[0, -1], model.run(alone)[0, -1]
    with patch.applied(model):
        patched = model.run(alone)[0, -1]
relative_errors = {
    name: float((logits - expected).norm() / expected.norm())
    for name, logits in {"patched": patched, "unpatched": unpatched}.items()
}
print("relative error, patched below 1e-5:", relative_errors["patched"] < 1e-5)
print(f"relative error, unpatched: {relative_errors['unpatched']:.1f}")

# %% [markdown]
# This is so by construction, for any weights and any context, and for this one token. It is no evidence for gradient
# descent. How much *one* change does for all queries is a question for measurements
# ([Findings](findings.md#the-context-as-one-change-of-weights)).
#
# ## 8. Momentum attention
#
# Gradient descent often has momentum: each step adds $\eta$ times the step before. Read backwards, that is attention
# with a decaying sum of past values. On the linear layer of the beginning, the two are equal again:

# %%
W, errors = icl.dual.sgd(W_0, inputs, gradient, lr=0.05, momentum=0.5)
by_attention = x @ W_0.T + momentum_linear_attention(x, inputs, errors, eta=0.5)
print("equal up to rounding:", torch.allclose(x @ W.T, by_attention, rtol=0, atol=1e-12))

# %% [markdown]
# Inside this block, the pretrained model has momentum in every head. It was not trained with it, and answers no better:

# %%
with icl.momentum_attention(model, 0.3):
    with_momentum = icl.capture(model, prompts)
print(f"accuracy in context: {experiment.in_context.accuracy:.2f}, with momentum: {with_momentum.accuracy:.2f}")

# %% [markdown]
# ## From here
#
# - [The idea](idea.md): the equations in order, and what each of them assumes.
# - [Guide](guide.md): your own task, your own model, saving, plots.
# - [Metrics](metrics.md): every metric with its definition, its baseline and what is known against it.
# - [Findings](findings.md): what came out, with figures and commands.
