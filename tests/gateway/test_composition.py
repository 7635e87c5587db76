"""Several adapters in one request: in front by `model` or `adapters`, and inside prompts and messages."""

import asyncio
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument, Unavailable
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_gateway.caller import ANYBODY
from softprompt_gateway.catalog import Catalog
from softprompt_gateway.clients import RegistryClient, open_clients
from softprompt_gateway.lease import Lease
from softprompt_gateway.resolve import Named, Resolver

DIGEST_HEADER = "x-softprompt-adapter-digest"


def soft(name: str) -> dict[str, str]:
    return {"type": "soft_prompt", "name": name}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.fixture
async def digests(stack: Any) -> dict[str, str]:
    """Digests of adapters of all sorts, by `name@version`."""
    versions = [
        await stack.registry.add("a", virtual_tokens=3),
        await stack.registry.add("b", virtual_tokens=5),
        await stack.registry.add("b", virtual_tokens=6),
        await stack.registry.add("tasks", virtual_tokens=4, num_tasks=2),
        await stack.registry.add("given", virtual_tokens=7, kind="PREFIX_TUNING"),
        await stack.registry.add("cart", virtual_tokens=8, kind="CARTRIDGE"),
        await stack.registry.add("lora", virtual_tokens=0, kind="LORA"),
        await stack.registry.add("lora2", virtual_tokens=0, kind="LORA"),
    ]
    async with asyncio.timeout(5):
        while "lora2" not in await stack.listed():  # the gateway hears of all in this order
            pass
    return {f"{version.name}@{version.version}": version.digest for version in versions}


@pytest.mark.parametrize(
    ("model", "header", "virtual"),
    [
        ("a+b", "a@1+b@2", 9),
        ("b@1+a+lora", "b@1+a@1+lora@1", 8),
        ("lora+given+a", "lora@1+given@1+a@1", 10),
        ("a+a", "a@1+a@1", 6),
        ("acme/tiny-1:a+tasks:1", "a@1+tasks@1:1", 7),
        ("a+digest", "a@1+b@1", 8),
    ],
)
async def test_plus_puts_adapters_together_and_the_response_names_all_in_order(
    stack: Any, digests: dict[str, str], model: str, header: str, virtual: int
) -> None:
    model = model.replace("digest", digests["b@1"])
    response = await stack.complete("hi", model=model)
    assert response.status_code == 200, response.text
    assert response.headers["x-softprompt-adapter"] == header
    told = "+".join(
        digests[name.partition(":")[0]] + (name.partition(":")[1] + name.partition(":")[2])
        for name in header.split("+")
    )
    assert response.headers[DIGEST_HEADER] == told == stack.inference.requests[-1].adapter
    assert response.json()["model"] == model
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["virtual_tokens"]) == (2, virtual)
    # What the response names is a model too, for ever.
    for spelling in (header, response.headers[DIGEST_HEADER]):
        again = await stack.chat("hi", model=spelling)
        assert again.headers["x-softprompt-adapter"] == header


async def test_the_field_adapters_does_what_plus_does(stack: Any, digests: dict[str, str]) -> None:
    response = await stack.complete("hi", adapters=["b@latest", "lora"])
    assert response.headers["x-softprompt-adapter"] == "b@2+lora@1"
    chat = await stack.chat("hi", model=stack.base, adapters=["b", "lora"])
    assert chat.headers[DIGEST_HEADER] == response.headers[DIGEST_HEADER]
    assert (await stack.complete("hi", adapters=[])).headers.get("x-softprompt-adapter") is None
    tokens = (await stack.post("/tokenize", prompt="hi", adapters=["a", "b"])).json()
    assert (tokens["count"], tokens["virtual_tokens"]) == (2, 9)


async def test_soft_prompts_stand_inside_a_completions_prompt(stack: Any, digests: dict[str, str]) -> None:
    prompt = [text("one "), text("two"), soft("b@1"), text(" three"), soft("a"), soft("a")]
    response = await stack.complete(prompt, model="a+lora")
    request = stack.inference.requests[-1]
    assert request.parts == pb.PromptParts(
        parts=[
            pb.PromptPart(text="one two"),
            pb.PromptPart(soft_prompt=digests["b@1"]),
            pb.PromptPart(text=" three"),
            pb.PromptPart(soft_prompt=digests["a@1"]),
            pb.PromptPart(soft_prompt=digests["a@1"]),
        ]
    )
    assert response.headers["x-softprompt-adapter"] == "a@1+lora@1+b@1"
    assert response.headers[DIGEST_HEADER] == "+".join(digests[name] for name in ("a@1", "lora@1", "b@1"))
    details = response.json()["usage"]["prompt_tokens_details"]
    assert details["virtual_tokens"] == 3 + 5 + 3 + 3


async def test_many_prompts_may_be_in_parts_and_the_base_model_needs_no_model_of_its_own(
    stack: Any, digests: dict[str, str]
) -> None:
    prompts = [[text("x"), soft("a")], [soft("b"), text("yz")], [text("plain")]]
    response = await stack.complete(prompts)
    assert [choice["text"] for choice in response.json()["choices"]] == ["x", "yz", "plain"]
    assert response.headers["x-softprompt-adapter"] == "a@1+b@2"
    sent = [[part.soft_prompt for part in request.parts.parts] for request in stack.inference.requests]
    assert sent == [["", digests["a@1"]], [digests["b@2"], ""], [""]]
    assert response.json()["usage"]["prompt_tokens_details"]["virtual_tokens"] == 3 + 6


async def test_echo_has_the_text_and_nothing_where_soft_prompts_stand(stack: Any, digests: dict[str, str]) -> None:
    prompt = [text("ab"), soft("a"), text("cd"), soft("b")]
    choice = (await stack.complete(prompt, echo=True, model="a")).json()["choices"][0]
    assert choice["text"] == "abcd" + "ABCD"
    events = await stack.events("/v1/completions", model=stack.base, prompt=prompt, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "abcdabcd"
    ids = (await stack.complete(prompt, return_token_ids=True)).json()["choices"][0]["prompt_token_ids"]
    assert ids == list(b"abcd")


async def test_soft_prompts_stand_inside_messages(stack: Any, digests: dict[str, str]) -> None:
    messages = [
        {"role": "system", "content": [soft("tasks:1")]},
        {"role": "user", "content": [text("one"), text("two"), soft("a"), text("three")]},
        {"role": "assistant", "content": [text("plain"), text("parts")]},
        {"role": "user", "content": [soft("b"), soft("a"), text("four")]},
    ]
    response = await stack.post("/v1/chat/completions", model="lora", messages=messages, max_tokens=50)
    assert response.status_code == 200, response.text
    sent = [(message.content, list(message.parts)) for message in stack.inference.requests[-1].chat.messages]
    part = pb.ContentPart
    assert sent == [
        ("", [part(soft_prompt=digests["tasks@1"] + ":1")]),
        ("", [part(text="one\ntwo"), part(soft_prompt=digests["a@1"]), part(text="three")]),
        ("plain\nparts", []),
        ("", [part(soft_prompt=digests["b@2"]), part(soft_prompt=digests["a@1"]), part(text="four")]),
    ]
    assert response.headers["x-softprompt-adapter"] == "lora@1+tasks@1:1+a@1+b@2"
    virtual = response.json()["usage"]["prompt_tokens_details"]["virtual_tokens"]
    assert virtual == 4 + 3 + 6 + 3
    tokens = await stack.post("/tokenize", messages=messages, model="a")
    assert tokens.json()["virtual_tokens"] == 3 + virtual
    tokens = await stack.post("/tokenize", prompt=[text("x"), soft("a"), text("y")])
    assert (tokens.json()["tokens"], tokens.json()["virtual_tokens"]) == ([120, 121], 3)


async def test_soft_prompts_stand_inside_results_and_beside_calls(stack: Any, digests: dict[str, str]) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [soft("a"), text("one")]},
        {"role": "assistant", "content": [text("two"), soft("b")], "tool_calls": [call]},
        {"role": "tool", "content": [text("three"), soft("a")], "tool_call_id": "call_1"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    response = await stack.post(
        "/v1/chat/completions", model=stack.base, messages=messages, tools=tools, max_tokens=50
    )
    assert response.status_code == 200, response.text
    part, a, b = pb.ContentPart, digests["a@1"], digests["b@2"]
    sent = stack.inference.requests[-1].chat
    assert list(sent.messages) == [
        pb.ChatMessage(role="user", parts=[part(soft_prompt=a), part(text="one")]),
        pb.ChatMessage(
            role="assistant",
            parts=[part(text="two"), part(soft_prompt=b)],
            tool_calls=[pb.ToolCall(id="call_1", name="f", arguments="{}")],
        ),
        pb.ChatMessage(role="tool", parts=[part(text="three"), part(soft_prompt=a)], tool_call_id="call_1"),
    ]
    assert len(sent.tools) == 1


async def test_one_request_has_one_version_of_a_name_wherever_it_names_it(
    stack: Any, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get = RegistryClient.get_adapter

    async def counted(self: RegistryClient, spelling: str) -> Any:
        asked.append(spelling)
        version = await get(self, spelling)
        await stack.registry.add("b")  # while the request is looked up
        return version

    monkeypatch.setattr(RegistryClient, "get_adapter", counted)
    response = await stack.complete([text("x"), soft("b@latest"), soft("b")], model="b+b")
    assert response.headers["x-softprompt-adapter"] == "b@2+b@2"
    assert asked == ["b"]


MIXED_UP = [
    ({"model": "lora+lora2"}, "model", "lora and lora2 are both LoRAs"),
    ({"model": "lora+a+lora"}, "model", "lora and lora are both LoRAs"),
    ({"model": "given+cart"}, "model", "given and cart both give keys and values"),
    ({"model": "a+given"}, "model", "given gives keys and values (CARTRIDGE, PREFIX_TUNING)"),
    ({"adapters": ["a", "cart"]}, "adapters", "cart gives keys and values"),
    ({"adapters": ["lora", "lora2"]}, "adapters", "both LoRAs"),
    ({"model": "a", "adapters": ["b"]}, "adapters", "model names adapters already"),
    ({"model": "a+tasks"}, "model", "has the tasks 0 to 1"),
    ({"adapters": ["a:0"]}, "adapters", "a has no tasks"),
    ({"model": "+".join(["a"] * 17)}, "model", "has 17 adapters; at most 16"),
    ({"adapters": ["a"] * 17}, "adapters", ""),
    ({"adapters": "a"}, "adapters", ""),
    ({"adapters": [5]}, "adapters.0", ""),
    ({"prompt": [{"type": "text", "text": "x"}, soft("given")]}, "prompt", "given gives keys and values"),
    ({"prompt": [{"type": "text", "text": "x"}, soft("lora")]}, "prompt", "lora is a LoRA"),
    ({"prompt": [{"type": "text", "text": "x"}, soft("tasks")]}, "prompt", "has the tasks 0 to 1"),
    ({"prompt": [soft("a")]}, "prompt", "must have text beside its soft prompts"),
    ({"prompt": [{"type": "image_url"}]}, "prompt", "'image_url' is not supported"),
    ({"prompt": [{"type": "text", "text": "x"}, "y"]}, "prompt", "prompt must hold"),
    ({"prompt": [{"type": "soft_prompt"}]}, "prompt", "content part 0: name is required"),
    ({"prompt": [{**soft("a"), "weight": 2}]}, "prompt", "content part 0: unknown parameter 'weight'"),
    ({"prompt": [text("x"), {"type": "text", "text": 5}]}, "prompt", "content part 1: text: "),
]


@pytest.mark.parametrize(("fields", "param", "message"), MIXED_UP, ids=range(len(MIXED_UP)))
async def test_what_does_not_go_together_is_refused_by_field(
    stack: Any, digests: dict[str, str], fields: dict[str, Any], param: str, message: str
) -> None:
    response = await stack.complete(**{"prompt": "x"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert stack.inference.requests == []


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        ([soft("given"), text("x")], "messages", "given gives keys and values"),
        ([soft("lora"), text("x")], "messages", "lora is a LoRA"),
        ([{"type": "soft_prompt", "name": 5}], "messages.0.content", "content part 0: name: "),
        ([{"type": "soft_prompts", "name": "a"}], "messages.0.content", "only 'text' and 'soft_prompt'"),
    ],
)
async def test_what_cannot_stand_in_a_message_is_refused_by_field(
    stack: Any, digests: dict[str, str], content: Any, param: str, message: str
) -> None:
    response = await stack.chat(content)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "a+bee"}, "model", "the model 'a+bee' does not exist: there is no adapter 'bee'"),
        ({"model": "a+"}, "model", "there is no adapter ''"),
        ({"model": "a+b@9"}, "model", "there is no adapter 'b@9'"),
        ({"model": "a+acme/tiny-1"}, "model", "does not exist"),
        ({"adapters": ["lora3"]}, "adapters", "the adapter 'lora3' does not exist; did you mean 'lora"),
        ({"adapters": ["a+b"]}, "adapters", "the adapter 'a+b' does not exist"),
        (
            {"prompt": [text("x"), soft("given2")]},
            "prompt",
            "the adapter 'given2' does not exist; did you mean 'given'?",
        ),
        ({"prompt": [text("x"), soft("acme/tiny-1")]}, "prompt", "does not exist"),
    ],
)
async def test_an_adapter_that_is_not_there_is_named(
    stack: Any, digests: dict[str, str], fields: dict[str, Any], param: str, message: str
) -> None:
    await stack.until_listed("a", "b", "tasks:0", "tasks:1", "given", "cart", "lora", "lora2")
    response = await stack.complete(**{"prompt": "x"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", param), error
    assert message in error["message"]


async def test_what_the_inference_service_refuses_of_adapters_is_refused_of_model(stack: Any) -> None:
    async def refused(request: Any) -> Any:
        raise InvalidArgument("the request needs 2 soft prompts", field="adapter")
        yield

    stack.inference._generate = refused
    response = await stack.complete("x")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


async def test_while_the_registry_is_away_compositions_are_served_as_last_heard_of(
    stack: Any, digests: dict[str, str]
) -> None:
    await stack.complete("x", model="a+b@1")
    stack.registry.error = Unavailable("away")
    response = await stack.complete([text("x"), soft("a")], model="b@1+a")
    assert response.headers["x-softprompt-adapter"] == "b@1+a@1"


async def test_a_composition_is_a_model_that_can_be_looked_up(stack: Any, digests: dict[str, str]) -> None:
    card = (await stack.http.get("/v1/models/a+lora")).json()
    assert (card["id"], card["root"], card["parent"]) == ("a+lora", "a@1+lora@1", stack.base)
    assert [(one["name"], one["kind"], one["digest"]) for one in card["adapters"]] == [
        ("a", "PROMPT_TUNING", digests["a@1"]),
        ("lora", "LORA", digests["lora@1"]),
    ]
    assert "a+lora" not in await stack.listed()


async def test_every_adapter_of_a_request_is_told_by_its_target(stack: Any, digests: dict[str, str]) -> None:
    clients = open_clients(stack.settings)
    try:
        catalog = Catalog()
        resolver = Resolver(clients.registry, clients.inference, catalog, Lease(catalog, clients.registry))
        target = await resolver.resolve(
            Named(model="a+lora", caller=ANYBODY, inside=("tasks:1", "a", digests["b@1"]))
        )
        told = [(bound.version.name, bound.version.version, bound.task) for bound in target.adapters]
        assert told == [("a", 1, None), ("lora", 1, None), ("tasks", 1, 1), ("b", 1, None)]
        assert [bound.spelling for bound in target.front] == ["a@1", "lora@1"]
        assert (await resolver.resolve(Named(model=stack.base, caller=ANYBODY))).adapters == []
    finally:
        await clients.close()


HALF = [text("x")] * 2049


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [text("x"), *[soft("a")] * 4096]}),
        ("/v1/completions", {"prompt": [HALF, HALF]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}] * 2}),
        ("/v1/responses", {"input": [{"role": "user", "content": HALF}] * 2}),
        (
            "/v1/responses",
            {
                "input": [
                    {"role": "user", "content": HALF},
                    {"type": "function_call_output", "call_id": "1", "output": HALF},
                ]
            },
        ),
        ("/tokenize", {"prompt": HALF * 2}),
        ("/tokenize", {"messages": [{"role": "user", "content": HALF}] * 2}),
    ],
)
async def test_a_request_has_so_many_parts_and_no_more(stack: Any, path: str, body: dict[str, Any]) -> None:
    answer = await stack.post(path, model=stack.base, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", next(iter(body)))
    assert "at most 4096" in error["message"]


async def test_as_many_parts_as_are_allowed_are_served(stack: Any, digests: dict[str, str]) -> None:
    answer = await stack.complete([text("x"), *[soft("a")] * 4095])
    assert answer.json()["usage"]["prompt_tokens_details"]["virtual_tokens"] == 3 * 4095


async def test_of_several_unknown_adapters_a_near_name_is_looked_for_once(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for: list[str] = []

    def near(_catalog: Catalog, spelling: str, *_others: str, **_options: Any) -> str:
        looked_for.append(spelling)
        return ""

    monkeypatch.setattr(Catalog, "near", near)
    answer = await stack.complete("hi", adapters=[f"unknown{number}" for number in range(8)])
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(looked_for) == 1
