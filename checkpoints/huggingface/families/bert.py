"""BERT in Megatron's order and in the original one.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mlm_eval.checkpoints.huggingface.families.family import Family, Row
from mlm_eval.checkpoints.huggingface.fields import (
    COMMON_FIELDS,
    GELU,
    VOCAB_SIZE,
    Field,
    Use,
    other_fields,
    refused_field,
    setting_field,
    tied_field,
)
from mlm_eval.checkpoints.huggingface.layout import SPLIT_QKV


def _bert_rows(norms: Mapping[str, str]) -> tuple[Row, ...]:
    """Return BERT's names; the two orders differ in where the norms are (the final one last)."""
    own, theirs = "encoder.layers.{i}.", "bert.encoder.layer.{i}."
    attention = f"{theirs}attention."
    qkv = tuple(f"{attention}self.{which}" for which in ("query", "key", "value"))
    *layer_norms, final_norm = (Row(name, (their,)) for name, their in norms.items())
    return (
        Row("embedding.word_embeddings", ("bert.embeddings.word_embeddings",), False),
        Row("embedding.position_embeddings", ("bert.embeddings.position_embeddings",), False),
        Row("embedding.tokentype_embeddings", ("bert.embeddings.token_type_embeddings",), False),
        *layer_norms,
        Row(f"{own}self_attention.linear_qkv", qkv, layout=SPLIT_QKV),
        Row(f"{own}self_attention.linear_proj", (f"{attention}output.dense",)),
        Row(f"{own}mlp.linear_fc1", (f"{theirs}intermediate.dense",)),
        Row(f"{own}mlp.linear_fc2", (f"{theirs}output.dense",)),
        final_norm,
        Row("pooler.dense", ("bert.pooler.dense",), optional=True),
        Row("output_layer", ("cls.predictions",), optional=True, weight=False),
        Row("output_layer", ("cls.predictions.decoder",), False, optional=True),
        Row("lm_head.dense", ("cls.predictions.transform.dense",), optional=True),
        Row("lm_head.layer_norm", ("cls.predictions.transform.LayerNorm",), optional=True),
        Row("binary_head", ("cls.seq_relationship",), optional=True),
        Row("classification_head", ("classifier",), optional=True),
        Row("multichoice_head", ("classifier",), optional=True),
        Row("qa_head", ("qa_outputs",), optional=True),
    )


def _bert_fields(hidden: int, layers: int, heads: int, ffn: int) -> tuple[Field, ...]:
    """Return the keys of both orders, whose classes have defaults of their own."""
    return (
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", hidden),
        setting_field("num_layers", "num_hidden_layers", layers),
        setting_field("num_attention_heads", "num_attention_heads", heads),
        setting_field("ffn_hidden_size", "intermediate_size", ffn),
        setting_field("activation", "hidden_act", "gelu", codes=GELU),
        setting_field("max_position_embeddings", "max_position_embeddings", 512),
        setting_field("num_tokentypes", "type_vocab_size", 2),
        setting_field("layernorm_epsilon", "layer_norm_eps", 1e-12),
        setting_field("hidden_dropout", "hidden_dropout_prob", 0.1),
        setting_field("attention_dropout", "attention_probs_dropout_prob", 0.1),
        setting_field("init_method_std", "initializer_range", 0.02),
        tied_field(True),
        refused_field("is_decoder", "a causal mask (a decoder)", False, default=False),
        refused_field("add_cross_attention", "cross-attention", False, default=False),
        refused_field(
            "position_embedding_type", "relative positions", "absolute", default="absolute"
        ),
        refused_field("is_causal", "a causal mask", False, None),
        *other_fields(
            Use.METADATA, "lets transformers round heads down, which is refused", "embedding_size"
        ),
        *other_fields(
            Use.METADATA,
            "of Google's multilingual files; no code of transformers reads it",
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
    )


MEGATRON_BERT = Family(
    model_type="megatron-bert",
    kind="bert",
    model_class="MegatronBert",
    prefix="bert.",
    shared=COMMON_FIELDS,
    fields=_bert_fields(1024, 24, 16, 4096),
    rows=_bert_rows(
        {
            "encoder.layers.{i}.input_layernorm": "bert.encoder.layer.{i}.attention.ln",
            "encoder.layers.{i}.pre_mlp_layernorm": "bert.encoder.layer.{i}.ln",
            "encoder.final_layernorm": "bert.encoder.ln",
        }
    ),
)
ORIGINAL_BERT = dataclasses.replace(
    MEGATRON_BERT,
    model_type="bert",
    model_class="Bert",
    fields=_bert_fields(768, 12, 12, 3072),
    constants={"apply_residual_connection_post_layernorm": True},
    rows=_bert_rows(
        {
            "encoder.layers.0.input_layernorm": "bert.embeddings.LayerNorm",
            "encoder.layers.{i}.input_layernorm": "bert.encoder.layer.{i-1}.output.LayerNorm",
            "encoder.layers.{i}.pre_mlp_layernorm": (
                "bert.encoder.layer.{i}.attention.output.LayerNorm"
            ),
            "encoder.final_layernorm": "bert.encoder.layer.{last}.output.LayerNorm",
        }
    ),
)
