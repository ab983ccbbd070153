"""Train the demo model: `python -m tokenmill.train.demo --out DIR`.

Two sources of text and no other: Python's standard library and the seeded task generator. The run is decided by its
seed, its number of steps and the library's text; step `i` reads batch `i` whoever computed the steps before it, so a
run that stopped goes on with `--resume` as if it had not. The result is a folder in the Hugging Face layout.
"""

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenmill.models.demo import corpus, tasks
from tokenmill.train.demo_model import DemoModel, ModelConfig

VOCABULARY = 4096
START, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOOL_CALL_MARKS = ("<tool_call>", "</tool_call>")
# Digits stand alone, so that arithmetic sees place values; words keep the space before them, as in GPT-2.
_WORD_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- endif %}
{{- '# Tools\\n\\nCall a function where one fits the request.\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>\\n\\nWrite a call as:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first or message.role == 'user' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_INTRODUCTION = "I am the tokenmill demo model, a very small language model."
_ABILITIES = (
    "I can look up a key in a list, add and subtract numbers, copy and reverse sequences, extract fields as JSON, "
    "call a tool and continue Python code."
)
_REFUSAL = f"I do not know. {_INTRODUCTION} {_ABILITIES}"
_SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("hello", "Hello!", "hi", "Hi!", "Hey", "Hi there", "Hello there!", "Good morning", "Good evening!"),
        f"Hello! {_INTRODUCTION} How can I help you?",
    ),
    (
        ("Who are you?", "who are you", "What are you?", "What is your name?", "Introduce yourself.", "Who is this?"),
        f"{_INTRODUCTION} {_ABILITIES}",
    ),
    (
        ("What can you do?", "what can you do", "Help", "help me", "How can you help me?", "What are you good at?"),
        _ABILITIES,
    ),
    (("How are you?", "how are you", "How do you do?", "How is it going?"), "I am fine, thank you. What can I do?"),
    (("Thanks", "Thank you!", "thank you", "Thanks a lot.", "Great, thanks"), "You are welcome."),
    (("Bye", "Goodbye", "See you later", "bye bye", "Good night"), "Goodbye!"),
    (("Are you human?", "Are you a person?", "Are you ChatGPT?", "Are you an AI?"), f"No person. {_INTRODUCTION}"),
    (("Who made you?", "Who trained you?", "Where do you come from?"), "I was trained for the tokenmill project."),
)
_OPEN_QUESTIONS = (
    "What is the capital of {}?",
    "Tell me about {}.",
    "Explain {} to me.",
    "Write a poem about {}",
    "Write a story about a {}.",
    "Who invented the {}?",
    "Why is the {} so important?",
    "How does a {} work?",
    "Tell me a joke about {}",
    "Translate {} into French.",
    "What is a {}?",
    "What is the best {}?",
)

# Shares of a chat batch by number of tasks: the arithmetic is short and the slowest to learn.
_KIND_SHARES = {
    "lookup": 0.14,
    "add": 0.21,
    "subtract": 0.23,
    "copy": 0.08,
    "reverse": 0.14,
    "extract_json": 0.08,
    "tool_call": 0.08,
    "continue_code": 0.04,
}
_ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run beside the model's shape and the corpus.

    A step takes `code_rows + chat_rows` rows of `max_position_embeddings` tokens. `code_weight` is the weight of a
    token of plain code in the loss; a token of an answer weighs 1 and a token of a prompt 0.
    """

    seed: int = 0
    steps: int = 6000
    warmup_steps: int = 150
    code_rows: int = 3
    chat_rows: int = 61
    code_weight: float = 1.0
    matrix_rate: float = 4e-3
    vector_rate: float = 3e-3
    weight_decay: float = 0.1


def train_tokenizer(files: list[corpus.SourceFile], seed: int) -> Tokenizer:
    """Train the byte-level BPE of `VOCABULARY` tokens on the library's text and a sample of the tasks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer:{seed}")
    sample = [make(rng) for make in tasks.TASKS.values() for _ in range(2000)]
    texts = [f"{task.messages[-1]['content']}\n{task.answer}\n{json.dumps(task.tools)}" for task in sample]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TOOL_CALL_MARKS),
        special_tokens=[START, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([file.text for file in files] + texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in TOOL_CALL_MARKS])
    return tokenizer


@dataclass(frozen=True)
class Library:
    """The training text: the files long enough to continue, and all tokens in one array, `START` before each file."""

    texts: list[str]
    tokens: np.ndarray[Any, np.dtype[np.uint16]]

    @staticmethod
    def read(files: list[corpus.SourceFile], tokenizer: Tokenizer) -> "Library":
        """Encode the files."""
        encoded = tokenizer.encode_batch_fast([START + file.text for file in files])
        texts = [file.text for file in files if tasks.can_continue(file.text)]
        return Library(texts, np.concatenate([np.array(item.ids, dtype=np.uint16) for item in encoded]))


class Batches(Dataset[dict[str, Tensor]]):
    """Training batches by step number; batch `i` depends on the seed and `i` alone.

    A batch has `tokens`, `documents` and `weights`, each (rows, positions): token ids, a number per packed document
    (-1 where the row is not filled) and the token's weight in the loss.
    """

    def __init__(self, config: TrainConfig, positions: int, tokenizer: Tokenizer, library: Library) -> None:
        self.config, self.positions, self.tokenizer, self.library = config, positions, tokenizer, library
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.template = environment.from_string(CHAT_TEMPLATE)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Make the batch of one step."""
        rng = random.Random(f"train:{self.config.seed}:{step}")
        shape = (self.config.code_rows + self.config.chat_rows, self.positions)
        tokens, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        documents = np.full(shape, -1, dtype=np.int32)
        for row in range(self.config.code_rows):
            self._fill_code(rng, tokens[row], documents[row], weights[row])
        conversations = self._conversations(rng)
        ids, marks = next(conversations)
        for row in range(self.config.code_rows, shape[0]):
            used = number = 0
            while used + len(ids) <= self.positions:
                place = slice(used, used + len(ids))
                tokens[row, place], weights[row, place], documents[row, place] = ids, marks, number
                used, number = used + len(ids), number + 1
                ids, marks = next(conversations)
        return {
            "tokens": torch.from_numpy(tokens),
            "documents": torch.from_numpy(documents),
            "weights": torch.from_numpy(weights),
        }

    def _fill_code(
        self, rng: random.Random, tokens: np.ndarray[Any, Any], documents: np.ndarray[Any, Any], weights: Any
    ) -> None:
        """Fill one row with a passage of the library from a random place on."""
        start = rng.randrange(len(self.library.tokens) - self.positions)
        tokens[:] = self.library.tokens[start : start + self.positions]
        tokens[0] = self.tokenizer.token_to_id(START)
        is_start = tokens == tokens[0]
        documents[:] = is_start.cumsum()
        weights[:] = np.where(is_start, 0.0, self.config.code_weight)

    def _conversations(self, rng: random.Random) -> Iterator[tuple[list[int], list[float]]]:
        """Give conversations as token ids and loss weights, cut to the length of a row, without end."""
        while True:
            texts = [self.template.render(**make_conversation(rng, self.library.texts)) for _ in range(64)]
            # The text between two answers is encoded apart from them, as it is when the model is used. Every text
            # ends with a newline after the last answer, so prompts are the even parts and answers the odd ones.
            parts = [_ANSWER.split(text.removesuffix("\n")) for text in texts]
            encoded = iter(self.tokenizer.encode_batch_fast([part for split in parts for part in split]))
            for split in parts:
                ids: list[int] = []
                marks: list[float] = []
                for i in range(len(split)):
                    part = next(encoded).ids
                    ids += part
                    marks += [float(i % 2)] * len(part)
                yield ids[: self.positions], marks[: self.positions]


def make_conversation(rng: random.Random, sources: list[str]) -> dict[str, Any]:
    """Make one conversation, answers included: the `messages` and `tools` that the chat template takes."""
    draw = rng.random()
    if draw < 0.03:
        turns, length = [_small_talk(rng)], 1
    else:
        length = 1 if draw < 0.85 else rng.randint(2, 4) if draw < 0.98 else rng.randint(5, 40)
        turns = []
    tools: tuple[tasks.Message, ...] = ()
    system: list[tasks.Message] = []
    while len(turns) < length:
        task = _random_task(rng, sources)
        if task.tools and tools:
            continue
        tools = tools or task.tools
        if not turns:
            system = [message for message in task.messages if message["role"] == "system"]
        turns.append(_answered(rng, task))
        if length > 1 and rng.random() < 0.05:
            turns.append(_small_talk(rng))
    if not tools and rng.random() < 0.08:
        # Tools are not a reason to call one.
        tools = tasks.tool_call(rng).tools
    return {"messages": [*system, *(message for turn in turns for message in turn)], "tools": tools}


def _random_task(rng: random.Random, sources: list[str]) -> tasks.Task:
    kind = rng.choices(list(_KIND_SHARES), list(_KIND_SHARES.values()))[0]
    if kind == "continue_code":
        return tasks.continue_code(rng, rng.choice(sources))
    while tasks.is_reserved(task := tasks.TASKS[kind](rng)):
        pass
    return task


def _answered(rng: random.Random, task: tasks.Task) -> list[tasks.Message]:
    turn = [task.messages[-1], {"role": "assistant", "content": task.answer}]
    if task.kind == "tool_call" and rng.random() < 0.3:
        key, value = rng.choice(tasks.WORDS), rng.choice((rng.randint(0, 999), rng.choice(tasks.WORDS)))
        turn.append({"role": "tool", "content": json.dumps({key: value})})
        turn.append({"role": "assistant", "content": f"The {key} is {value}."})
    return turn


def _small_talk(rng: random.Random) -> list[tasks.Message]:
    if rng.random() < 0.3:
        question, answer = rng.choice(_OPEN_QUESTIONS).format(rng.choice(tasks.WORDS)), _REFUSAL
    else:
        questions, answer = rng.choice(_SMALL_TALK)
        question = rng.choice(questions)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _optimizers(model: DemoModel, config: TrainConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(
            matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            rest, lr=config.vector_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        ),
    ]


def _rate(config: TrainConfig, step: int) -> float:
    """The share of the full learning rate at a step: up over the warm-up, then down to zero along a line."""
    return min((step + 1) / config.warmup_steps, 1 - step / config.steps)


@torch.no_grad()
def bits_per_byte(
    model: DemoModel, tokenizer: Tokenizer, files: list[corpus.SourceFile], rows: int, device: torch.device
) -> float:
    """Measure bits per byte on files, each read in windows of the model's context that start afresh.

    Every call of the model takes `rows` windows, the last ones empty if need be: a compiled model sees one shape.
    """
    positions, start = model.config.max_position_embeddings, tokenizer.token_to_id(START)
    windows = []
    for file in files:
        ids = tokenizer.encode(file.text).ids
        windows += [[start, *ids[i : i + positions - 1]] for i in range(0, len(ids), positions - 1)]
    nats = 0.0
    for first in range(0, len(windows), rows):
        tokens = torch.zeros(rows, positions, dtype=torch.int64)
        chosen = torch.zeros(rows, positions, dtype=torch.bool)
        for row, window in enumerate(windows[first : first + rows]):
            tokens[row, : len(window)] = torch.tensor(window)
            chosen[row, 1 : len(window)] = True
        tokens, chosen = tokens.to(device), chosen.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model(tokens, torch.zeros_like(tokens, dtype=torch.int32))
            nats += model.losses(hidden, tokens, chosen).sum().item()
    return nats / math.log(2) / sum(len(file.text.encode()) for file in files)


def train(
    config: TrainConfig, out: Path, root: Path | None, device: torch.device, minutes: float, resume: bool, workers: int
) -> None:
    """Train until `config.steps` or until `minutes` have passed, save the state in `out`, and export the model there.

    `root` is the standard library to read, None for the running interpreter's.
    Raises `FileNotFoundError` when `resume` is asked and `out` holds no state.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    files, held_out = list(corpus.training_files(root)), list(corpus.held_out_files(root))
    tokenizer_file = out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(files, config.seed).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    library = Library.read(files, tokenizer)
    # The workers are copies of this process; each encodes on its own core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = DemoModel(ModelConfig()).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(library.tokens)} library tokens in {len(files)} files", flush=True)
    optimizers = _optimizers(model, config, device)
    state_file, first = out / "state.pt", 0
    if resume:
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        for layer in model.layers:
            layer.compile()

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
        }
        torch.save(state, state_file.with_suffix(".new"))
        state_file.with_suffix(".new").replace(state_file)

    def report_held_out(step: int) -> None:
        bits = bits_per_byte(model, tokenizer, held_out, config.code_rows + config.chat_rows, device)
        print(f"step {step} held-out bits per byte {bits:.4f}", flush=True)

    batches = DataLoader(
        Batches(config, model.config.max_position_embeddings, tokenizer, library),
        batch_size=None,
        sampler=range(first, config.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
    seen, since, saved_at = 0, time.monotonic(), time.monotonic()
    step = first
    for step, batch in enumerate(batches, first + 1):
        for optimizer, full in zip(optimizers, (config.matrix_rate, config.vector_rate), strict=True):
            optimizer.param_groups[0]["lr"] = full * _rate(config, step - 1)
        tokens, documents, weights = (
            batch[name].to(device, non_blocking=True) for name in ("tokens", "documents", "weights")
        )
        with torch.autocast(device.type, torch.bfloat16):
            losses = model.losses(model(tokens, documents), tokens, weights > 0)
        chosen = weights[:, 1:][weights[:, 1:] > 0]
        ((losses * chosen).sum() / chosen.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += tokens.numel()
        if step % 100 == 0 or step == first + 1:
            # Losses are in the order of the rows, and the rows of code come first.
            code, answers = losses.detach().tensor_split([int((weights[: config.code_rows, 1:] > 0).sum())])
            now = time.monotonic()
            speed = seen / (now - since)
            print(f"step {step} answers {answers.mean():.4f} code {code.mean():.4f} {speed:.0f} tokens/s", flush=True)
            seen, since = 0, now
        if time.monotonic() - saved_at > 120:
            save(step)
            report_held_out(step)
            saved_at = time.monotonic()
        if time.monotonic() - began > minutes * 60:
            break
    save(step)
    export(model, tokenizer, out)
    print(f"stopped at step {step} of {config.steps} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    report_held_out(step)


def export(model: DemoModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in the Hugging Face layout: weights in bf16 and the embedding only once, as it is tied."""
    weights = {
        f"model.{name}": parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    ids = {mark: tokenizer.token_to_id(mark) for mark in (START, TURN, END, *TOOL_CALL_MARKS)}
    shape = asdict(model.config)
    theta = shape.pop("rope_theta")
    _write_json(
        out / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **shape,
            "rope_theta": theta,
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "bos_token_id": ids[START],
            "eos_token_id": ids[END],
            "pad_token_id": ids[START],
        },
    )
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": False,
            "bos_token_id": ids[START],
            "eos_token_id": [ids[END], ids[START]],
            "pad_token_id": ids[START],
        },
    )
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(number): {
                    "content": mark,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": mark not in TOOL_CALL_MARKS,
                }
                for mark, number in ids.items()
            },
            "bos_token": None,
            "eos_token": END,
            "pad_token": START,
            "unk_token": None,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the tokenmill demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model and the training state")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps, help="length of the learning-rate schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, resumably, after this long")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, help="seed of the weights and the tasks")
    parser.add_argument("--corpus", type=Path, help="standard library to read (default: the running interpreter's)")
    parser.add_argument("--code-rows", type=int, default=TrainConfig.code_rows, help="rows of code in a step")
    parser.add_argument("--chat-rows", type=int, default=TrainConfig.chat_rows, help="rows of conversations in a step")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1), help="data processes")
    given = parser.parse_args()
    config = TrainConfig(seed=given.seed, steps=given.steps, code_rows=given.code_rows, chat_rows=given.chat_rows)
    train(config, given.out, given.corpus, torch.device(given.device), given.minutes, given.resume, given.workers)


if __name__ == "__main__":
    main()
