"""THE TABLES: each Hugging Face family's names and config.json keys, read in both directions.

    family.py   `Family`, `Row`, and `entries`: the tensors that hold a model
    llama.py    the names and keys that most families share with Llama
    dense.py    GPT-2 and the dense families like Llama
    neox.py     GPT-NeoX and BLOOM
    gemma.py    Gemma, Gemma 2 and Gemma 3
    gpt_oss.py  gpt-oss
    experts.py  mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek V2 and V3
    llama4.py   Llama 4's language model
    images.py   models of text and images, whose language model is of a family here
    nemotron.py hybrids of Mamba-2: Nemotron-H
    bert.py     BERT in Megatron's order and in the original one
    t5.py       T5, with its gated variant, and mT5

`FAMILIES` lists them by model_type. Only this room's neighbours in `huggingface/` import from here.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlm_eval.checkpoints.huggingface.families.bert import MEGATRON_BERT, ORIGINAL_BERT
from mlm_eval.checkpoints.huggingface.families.dense import (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    STABLELM,
    STARCODER2,
)
from mlm_eval.checkpoints.huggingface.families.experts import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
)
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.families.gemma import GEMMA, GEMMA2, GEMMA3
from mlm_eval.checkpoints.huggingface.families.gpt_oss import GPT_OSS
from mlm_eval.checkpoints.huggingface.families.llama4 import LLAMA4
from mlm_eval.checkpoints.huggingface.families.nemotron import NEMOTRON_H
from mlm_eval.checkpoints.huggingface.families.neox import BLOOM, GPT_NEOX
from mlm_eval.checkpoints.huggingface.families.t5 import MT5, PLAIN_T5

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        STABLELM,
        STARCODER2,
        GPT_NEOX,
        BLOOM,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GPT_OSS,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        LLAMA4,
        NEMOTRON_H,
        MEGATRON_BERT,
        ORIGINAL_BERT,
        PLAIN_T5,
        MT5,
    )
}
