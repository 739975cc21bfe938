"""OpenAI's own client against the gateway: `openai_client.py BASE`. Pools `tiny` and `vectors` are cold."""

import json
import sys
import urllib.request

import openai

base = sys.argv[1]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60)
say = [{"role": "user", "content": "Say hello."}]


def pool(name):
    with urllib.request.urlopen(f"{base}/v1/pools/{name}") as answer:
        return json.load(answer)


assert pool("tiny")["state"] == "idle"
assert {"tiny", "vectors"} <= {model.id for model in client.models.list()}

# The first request starts the engine.
chat = client.chat.completions.create(model="tiny", messages=say, max_tokens=8)
assert chat.choices[0].message.content and chat.usage.completion_tokens == 8, chat

parts, finish, usage = [], None, None
stream = client.chat.completions.create(
    model="small", messages=say, max_tokens=8, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        parts.append(choice.delta.content or "")
        finish = choice.finish_reason or finish
assert "".join(parts) and finish == "length" and usage.completion_tokens == 8, (parts, finish, usage)

# Given up in the middle: the slot is free again while the engine had hundreds of tokens to go.
with client.chat.completions.create(model="tiny", messages=say, max_tokens=400, stream=True) as stream:
    next(iter(stream))
    assert pool("tiny")["active_leases"] == 1
for _ in range(1000):
    if pool("tiny")["active_leases"] == 0:
        break
else:
    raise AssertionError("the slot was not given back")

text = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=4)
assert text.choices[0].text and text.usage.completion_tokens == 4, text

vectors = client.embeddings.create(model="vectors", input=["one", "two"])
assert len(vectors.data) == 2 and len(vectors.data[0].embedding) > 8, vectors

try:
    client.chat.completions.create(model="nobody", messages=say)
    raise AssertionError("a model that nobody serves")
except openai.NotFoundError as error:
    assert error.code == "model_not_found", error.code

try:
    client.chat.completions.create(model="tiny", messages="no list")
    raise AssertionError("the engine refuses this")
except openai.BadRequestError:
    pass
print("done")
