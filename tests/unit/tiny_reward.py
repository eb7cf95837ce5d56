"""Small random reward models on disk, with a tokenizer: real parts, built in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("the", "cat", "dog", "sat", "ran", "is", "happy", "sad", "a", "on", "mat", "user:", "assistant:", "end")
VOCABULARY = {word: place for place, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
MAX_LEN = 48
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_config(**overrides: object) -> LlamaConfig:
    """Return the shape of every model here."""
    shape: dict[str, object] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": MAX_LEN,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(shape | overrides))


def write_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a word tokenizer that puts <s> in front."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat_template:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)


def write_policy(folder: Path, *, seed: int = 0, **overrides: object) -> Path:
    """Write a causal model with tokenizer and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_config(**overrides)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_classifier(folder: Path, *, seed: int = 0, **overrides: object) -> Path:
    """Write a whole sequence-classification model with tokenizer and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(**({"num_labels": 1} | overrides))
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_adapter(folder: Path, base: Path, *, seed: int = 1, gain: float = 2.0, bias: float = 0.5) -> Path:
    """Write a LoRA adapter with a score head over the model in `base`, none of it zero, and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            modules_to_save=["score"],
        )
        model = get_peft_model(classifier, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = "../" + base.name
        model.save_pretrained(folder, save_embedding_layers=False)
    write_scale(folder, base="../" + base.name, gain=gain, bias=bias, max_length=40)
    return folder


def write_scale(folder: Path, **content: object) -> None:
    """Write tether_reward.json."""
    (folder / "tether_reward.json").write_text(json.dumps(content), encoding="utf-8")
