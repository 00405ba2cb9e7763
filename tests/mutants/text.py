"""Faults of the chat format, of rows and of the tokenizer."""

from tests.mutants.mutant import Mutant

CHAT, TOKENIZER = "common/text/chat.py", "common/text/tokenizer.py"
T_CHAT = ("tests/common/text/test_chat.py",)
T_TOKENIZER = ("tests/common/text/test_tokenizer.py",)

MUTANTS = [
    Mutant(
        "end-token-not-learned",
        CHAT,
        "mask[len(mask) - len(content) :] = [1] * (len(content) + 1)",
        "mask[len(mask) - len(content) :] = [1] * len(content) + [0]",
        T_CHAT,
        "the assistant never learns to stop",
    ),
    Mutant(
        "role-token-learned",
        CHAT,
        "mask[len(mask) - len(content) :] = [1] * (len(content) + 1)",
        "mask[len(mask) - len(content) - 1 :] = [1] * (len(content) + 2)",
        T_CHAT,
        "the loss is on <|assistant|> too",
    ),
    Mutant(
        "prompts-learned",
        CHAT,
        "mask += [0] * (1 + len(content))",
        "mask += [1] * (1 + len(content))",
        T_CHAT,
        "the loss is on the user's text too",
    ),
    Mutant(
        "end-token-behind-every-message",
        CHAT,
        'if message["role"] == "assistant":\n            ids.append',
        'if message["role"]:\n            ids.append',
        T_CHAT,
        "the user's text is learned, and ended",
    ),
    Mutant(
        "prompt-without-the-assistants-token",
        CHAT,
        '[*render(tokenizer, messages).ids, tokenizer.role_ids["assistant"]]',
        "render(tokenizer, messages).ids",
        T_CHAT,
        "the model goes on with the user's text",
    ),
    Mutant(
        "base-prompt-without-its-start",
        CHAT,
        "[tokenizer.eot_id, *tokenizer.encode(",
        "[*tokenizer.encode(",
        T_CHAT,
        "a base model is asked in the middle of a document",
    ),
    Mutant(
        "sharegpt-system-is-the-user",
        CHAT,
        '{"human": "user", "gpt": "assistant"}',
        '{"human": "user", "gpt": "assistant", "system": "user"}',
        T_CHAT,
        "what the system says becomes a user's turn",
    ),
    Mutant(
        "alpaca-input-dropped",
        CHAT,
        'f"{instruction}\\n\\n{extra}" if extra else instruction',
        "instruction",
        T_CHAT,
        "the task's input is not in the prompt",
    ),
    Mutant(
        "template-learns-the-role-token",
        "common/text/template.py",
        "{{- '<|assistant|>' -}}{%- generation -%}\\",
        "{%- generation -%}{{- '<|assistant|>' -}}\\",
        ("tests/common/handoff/test_hf_published.py", *T_CHAT),
        "transformers masks otherwise than we do",
    ),
    Mutant(
        "control-tokens-in-decoded-text",
        TOKENIZER,
        "self.control_ids if skip_control else ()",
        "()",
        T_TOKENIZER + T_CHAT,
        "answers end in <|endoftext|>, as text",
    ),
    Mutant(
        "translated-answer-loses-its-end",
        TOKENIZER,
        "([target.eot_id] if ended else [])",
        "[]",
        ("tests/tools/compare/test_measure.py", *T_TOKENIZER),
        "an answer in another vocabulary was never complete",
    ),
    Mutant(
        "control-tokens-in-another-order",
        TOKENIZER,
        "vocab | {name: len(vocab) + i for i, name in enumerate(missing)}",
        "vocab | {name: len(vocab) + i for i, name in enumerate(sorted(missing))}",
        T_TOKENIZER,
        "old models read other control tokens",
    ),
    Mutant(
        "digits-in-runs-of-four",
        TOKENIZER,
        r"| ?\p{N}{1,3}" + '"\n',
        r"| ?\p{N}{1,4}" + '"\n',
        T_TOKENIZER,
        "numbers are cut otherwise than the text says",
    ),
]
