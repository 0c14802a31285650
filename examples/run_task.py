"""Tasks of the catalogue, asked by their fields through every prompt that they have.

python examples/run_task.py [MODEL]
"""

import sys

from mtllama import load_model
from mtllama.tasks.catalog import catalog

m = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")

for template in catalog()["copa"].prompts:
    answer = m.run_task(
        "copa", template=template.name, premise="The candle went out.", question="cause", choice1="I blew on it", choice2="I lit it"
    )
    print(f"[{answer.template}] {answer.answer}")

answer = m.run_task("squad", context="MT-LLaMA was tuned on P3, the Public Pool of Prompts.", question="What was MT-LLaMA tuned on?")
print(answer.prompt, "->", answer.answer)
