"""An app that leaves the adapters to the server it runs in: `adapter_name` is the model it asks for."""

import os

from openai import OpenAI


class InferlessPythonModel:
    def initialize(self):
        base_url = os.environ["MOTET_BASE_URL"]
        self.client = OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("MOTET_API_KEY", "any"))
        self.client.models.list()

    def infer(self, inputs):
        prompt = inputs["prompt"]
        adapter_name = inputs.pop("adapter_name")
        answer = self.client.chat.completions.create(
            model=adapter_name,
            messages=[{"role": "user", "content": prompt}],
            temperature=inputs.get("temperature", 0.0),
            max_tokens=inputs.get("max_new_tokens", 16),
        )
        return {"generated_result": answer.choices[0].message.content}

    def finalize(self):
        self.client = None
