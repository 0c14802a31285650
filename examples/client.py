"""A server of ours, asked by OpenAI's client and by plain HTTP.

mtllama serve smollm2-135m --port 8000 &
python examples/client.py http://127.0.0.1:8000
"""

import sys

import httpx
from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
(model,) = client.models.list()

stream = client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": "Is fog wet?"}], max_tokens=16, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))

scored = httpx.post(f"{url}/v1/score", json={"prompt": "Is fog wet?", "choices": ["Yes", "No"]}, timeout=60).json()
print({choice["text"]: round(choice["sum"], 3) for choice in scored["choices"]}, "best:", scored["choices"][scored["best"]]["text"])

fields = {"premise": "The candle went out.", "question": "cause", "choice1": "I blew on it", "choice2": "I lit it"}
asked = httpx.post(f"{url}/v1/tasks/copa/run", json={"fields": fields}, timeout=60).json()
print(asked["prompt"], "->", asked["answer"])
