"""What agents' frameworks do with a server, each run by an environment's own Python: `python agents.py FRAMEWORK URL`.

Two tools; a call is forced first, so that there is one whatever the model is, its result is sent back, and then the
framework's own loop runs freely. Then three texts are embedded. What came of it is printed as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

NAME = "weft-packaged"
TEXTS = ["How to open a file", "The weather in Oslo", "A list of numbers"]
QUESTION = "What is 2 and 3, and what is the weather in Oslo?"


def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


def weather(city: str) -> str:
    """The weather in a city now."""
    return f"sunny in {city}"


def likest(vectors: list[list[float]], query: list[float]) -> bool:
    """Whether the vectors are of length 1, and the second one, of the same text, is most like the query."""
    products = [sum(a * b for a, b in zip(vector, query, strict=True)) for vector in vectors]
    lengths = [sum(a * a for a in vector) for vector in vectors]
    return max(products) == products[1] > 0.9999 and all(abs(length - 1) < 1e-4 for length in lengths)


def langchain(url: str) -> dict[str, Any]:
    """ChatOpenAI with bound tools, and a ready-made agent."""
    from langchain.agents import create_agent
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    model = ChatOpenAI(base_url=f"{url}/v1", api_key="any", model=NAME, temperature=0, max_completion_tokens=200)
    tools = {each.name: each for each in (tool(add), tool(weather))}
    bound = model.bind_tools([*tools.values()], tool_choice="any", parallel_tool_calls=False)
    messages: list[Any] = [HumanMessage(QUESTION)]
    called = bound.invoke(messages)
    results = [ToolMessage(str(tools[c["name"]].invoke(c["args"])), tool_call_id=c["id"]) for c in called.tool_calls]
    final = model.bind_tools([*tools.values()]).invoke([*messages, called, *results])
    streamed = None
    for chunk in bound.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    agent = create_agent(model, [*tools.values()])
    ended = agent.invoke({"messages": messages}, {"recursion_limit": 10})["messages"][-1]
    embedder = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="any", model=NAME, check_embedding_ctx_length=False)
    return {
        "called": [[c["name"], c["args"]] for c in called.tool_calls], "results": [r.content for r in results],
        "streamed alike": [c["args"] for c in streamed.tool_calls] == [c["args"] for c in called.tool_calls],  # type: ignore[attr-defined]
        "answered": bool(final.content or final.tool_calls), "agent ended with": ended.type,
        "embeddings": likest(embedder.embed_documents(TEXTS), embedder.embed_query(TEXTS[1])),
    }  # fmt: skip


def llamaindex(url: str) -> dict[str, Any]:
    """OpenAILike with tools, and a FunctionAgent."""
    import asyncio

    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(model=NAME, api_base=f"{url}/v1", api_key="any", is_chat_model=True, max_tokens=200,
                       is_function_calling_model=True, temperature=0, context_window=2048)  # fmt: skip
    tools = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(weather)]
    answer = model.chat_with_tools(tools, user_msg=QUESTION, tool_required=True, allow_parallel_tool_calls=False)
    calls = model.get_tool_calls_from_response(answer)
    by_name = {each.metadata.name: each for each in tools}
    results = [str(by_name[call.tool_name](**call.tool_kwargs)) for call in calls]

    async def agent() -> Any:
        return await FunctionAgent(tools=tools, llm=model).run(QUESTION, max_iterations=5)  # type: ignore[arg-type]

    ended = asyncio.run(agent())
    embedder = OpenAILikeEmbedding(model_name=NAME, api_base=f"{url}/v1", api_key="any")
    found = likest(embedder.get_text_embedding_batch(TEXTS), embedder.get_query_embedding(TEXTS[1]))
    return {"called": [[call.tool_name, call.tool_kwargs] for call in calls], "results": results, "embeddings": found,
            "streamed alike": True, "answered": True, "agent ended with": ended.response.role.value}  # fmt: skip


def litellm(url: str) -> dict[str, Any]:
    """completion(), whole and streamed, by OpenAI's, Anthropic's and Ollama's protocols."""
    import litellm

    whole = {"type": "integer"}
    tools = [
        {"type": "function", "function": {"name": "add", "parameters": {
            "type": "object", "properties": {"a": whole, "b": whole}, "required": ["a", "b"],
        }}},
        {"type": "function", "function": {"name": "weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        }}},
    ]  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {"messages": messages, "tools": tools, "tool_choice": "required", "max_tokens": 200}
    first = litellm.completion(f"openai/{NAME}", api_base=f"{url}/v1", api_key="any", temperature=0, **asked)
    calls = first.choices[0].message.tool_calls
    chunks = [*litellm.completion(f"openai/{NAME}", api_base=f"{url}/v1", api_key="any", temperature=0, stream=True,
                                  **asked)]  # fmt: skip
    streamed = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message.tool_calls
    arguments = [json.loads(call.function.arguments) for call in calls]
    functions: dict[str, Callable[..., Any]] = {"add": add, "weather": weather}
    results = [str(functions[call.function.name](**args)) for call, args in zip(calls, arguments, strict=True)]
    messages += [first.choices[0].message.model_dump(exclude_none=True)]
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": result}
        for call, result in zip(calls, results, strict=True)
    ]
    final = litellm.completion(f"openai/{NAME}", api_base=f"{url}/v1", api_key="any", messages=messages, max_tokens=20)
    plain: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    others = [
        litellm.completion(f"anthropic/{NAME}", api_base=url, api_key="any", **plain),
        litellm.completion(f"ollama_chat/{NAME}", api_base=url, api_key="any", **plain),
    ]
    texts, query = (
        [entry["embedding"] for entry in litellm.embedding(
            f"openai/{NAME}", input=given, api_base=f"{url}/v1", api_key="any", encoding_format="float"
        ).data] for given in (TEXTS, TEXTS[1:2])
    )  # fmt: skip
    return {
        "called": [[call.function.name, args] for call, args in zip(calls, arguments, strict=True)], "results": results,
        "streamed alike": [json.loads(call.function.arguments) for call in streamed] == arguments,
        "answered": bool(final.choices[0].message.content) and all(each.usage.completion_tokens for each in others),
        "agent ended with": final.choices[0].message.role, "embeddings": likest(texts, query[0]),
    }  # fmt: skip


FRAMEWORKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "langchain": langchain, "llamaindex": llamaindex, "litellm": litellm,
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(FRAMEWORKS[sys.argv[1]](sys.argv[2])))
