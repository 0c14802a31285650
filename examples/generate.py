"""Text from a model: one answer, several together, and one as it comes.

python examples/generate.py [MODEL]
"""

import sys

from mtllama import load_model

m = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")

print(m.generate("Name a colour.", max_new_tokens=8))
print(m.generate(["Is fog wet?", "Is sand wet?"], max_new_tokens=8))
for piece in m.stream("Tell me about fog.", max_new_tokens=40, temperature=0.7, seed=1):
    print(piece, end="", flush=True)
print()
print(m.generate("The capital of France is", max_new_tokens=4, raw=True))  # no prompt format: text that goes on
