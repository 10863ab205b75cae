"""Chats to tokens: rendering, documents in the turn that retrieved them, and errors that say what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from midstream.errors import InputError, ModelError
from midstream.models.chat import ChatTokenizer, place_documents
from midstream.models.source import DEFAULT_MODEL, resolve
from midstream.types import Chat, Document, Message
from tests.helpers import tiny_llama
from tests.tiny import tiny_chat

INVOCATIONS = ("<|im_start|>answerability\n", "<|im_start|>jailbreak\n")
TITLED = Document(title="Lizard", text="Completed in 1752.")
BARE = Document(text="Automated in 1998.")


def user(content: str, *documents: Document) -> Message:
    return Message(role="user", content=content, documents=documents)


def with_template(template: str | None) -> ChatTokenizer:
    chat = tiny_chat()
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, chat.eos_token_ids)


def test_text_goes_to_tokens_and_back_with_its_special_tokens() -> None:
    chat = tiny_chat()
    text = "<|im_start|>user\n  two  spaces , kept<|im_end|>\n"
    assert chat.decode(chat.encode(text)) == text
    assert chat.encode("<|im_end|>") == tuple(chat.eos_token_ids)


def test_a_prompt_is_the_history_and_the_header() -> None:
    chat = tiny_chat()
    talk = Chat(messages=(user("hi"),))
    assert chat.decode(chat.history(talk)) == "<|im_start|>user\nhi<|im_end|>\n"
    assert chat.prompt(talk) == chat.history(talk) + chat.reply_header(talk)
    assert chat.decode(chat.reply_header(talk)) == "<|im_start|>assistant\n"


def test_documents_stand_in_their_own_turn() -> None:
    talk = Chat(
        messages=(user("when?", TITLED), Message(role="assistant", content="1752"), user("and then?")),
        documents=(BARE,),
    )
    first, answer, last = place_documents(talk)
    assert first == {"role": "user", "content": "Document [1]: Lizard\nCompleted in 1752.\n\nwhen?"}
    assert answer == {"role": "assistant", "content": "1752"}
    assert last["content"] == "Document [1]:\nAutomated in 1998.\n\nand then?"
    chat = tiny_chat()
    before = chat.history(Chat(messages=talk.messages[:2]))
    assert chat.history(talk)[: len(before)] == before


def test_a_turns_own_documents_come_before_the_chats() -> None:
    (turn,) = place_documents(Chat(messages=(user("q", TITLED),), documents=(BARE,)))
    assert turn["content"].index("[1]: Lizard") < turn["content"].index("[2]:\nAutomated")


def test_documents_without_a_user_turn_are_refused() -> None:
    with pytest.raises(InputError, match="user message"):
        place_documents(Chat(messages=(Message(role="assistant", content="x"),), documents=(BARE,)))


def test_a_template_with_documents_gets_the_chats_own() -> None:
    chat = with_template(
        "{% for d in documents %}[{{ d.title }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    talk = Chat(messages=(user("q", BARE),), documents=(TITLED,))
    assert chat.decode(chat.history(talk)) == "[Lizard]Document [1]:\nAutomated in 1998.\n\nq"


def test_templates_that_fail_or_lack_are_input_errors() -> None:
    talk = Chat(messages=(user("q"),))
    with pytest.raises(InputError, match="no chat template"):
        with_template(None).history(talk)
    with pytest.raises(InputError, match="refused the messages: only system"):
        with_template("{{ raise_exception('only system') }}").history(talk)
    with pytest.raises(InputError, match="changes the history"):
        with_template("{% if add_generation_prompt %}new{% else %}old{% endif %}").reply_header(talk)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        ChatTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("invocation", INVOCATIONS)
def test_the_default_models_tokens_are_stable_where_the_invocation_begins(invocation: str) -> None:
    chat = ChatTokenizer.from_folder(resolve(DEFAULT_MODEL))
    assert {chat.decode([token]) for token in chat.eos_token_ids} == {"<|im_end|>"}
    history = chat.history(Chat(messages=(user("When? ", TITLED),)))
    assert chat.encode(chat.decode(history) + invocation) == history + chat.encode(invocation)


def test_tools_and_template_arguments_go_to_the_template() -> None:
    template = "{{ mood }}|{{ tools[0].function.name }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = Chat(messages=(user("x"),), tools=({"function": {"name": "search"}},), template_arguments={"mood": "calm"})
    tokenizer = with_template(template)
    assert tokenizer.decode(tokenizer.prompt(chat)) == "calm|search|x"
    with pytest.raises(InputError, match="takes no tools"):
        tiny_chat().prompt(chat.model_copy(update={"template_arguments": {}}))


def test_template_arguments_cannot_change_the_rendering_itself() -> None:
    for name in ("tokenize", "chat_template", "add_generation_prompt", "conversation"):
        with pytest.raises(InputError, match=name):
            tiny_chat().prompt(Chat(messages=(user("x"),), template_arguments={name: "y"}))


def test_a_template_sees_the_further_fields_of_a_turn() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}:{{ m.tool_calls[0].id if m.tool_calls }};{% endfor %}"
    )
    call = Message(role="assistant", content="", extra={"tool_calls": [{"id": "c1"}]})
    assert tokenizer.decode(tokenizer.history(Chat(messages=(user("x"), call)))) == "user:;assistant:c1;"


def test_a_template_is_sandboxed() -> None:
    tokenizer = with_template("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="template"):
        tokenizer.prompt(Chat(messages=(user("x"),)))


def test_the_texts_of_tokens_make_the_text() -> None:
    chat = tiny_chat()
    tokens = chat.encode(" two words<|im_end|>")
    assert "".join(map(chat.token_text, tokens)) == " two words<|im_end|>"
    assert chat.token_text(chat.encode("é")[0]) == "�"
