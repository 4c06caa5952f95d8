"""An app as people deploy it to Inferless: transformers, one streamer on self, a thread that generates."""

from pathlib import Path
from threading import Thread

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL = Path(__file__).parents[4] / "server" / "embedded" / "model"


class InferlessPythonModel:
    def initialize(self):
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self.streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def infer(self, inputs, stream_output_handler):
        messages = [{"role": "user", "content": inputs["TEXT"]}]
        print("asked for", messages)
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        options = dict(prompt, streamer=self.streamer, do_sample=False, max_new_tokens=24)
        thread = Thread(target=self.model.generate, kwargs=options)
        thread.start()
        for new_text in self.streamer:
            output = {}
            output["OUT"] = new_text
            stream_output_handler.send_streamed_output(output)
        thread.join()
        stream_output_handler.finalise_streamed_output()

    def finalize(self, args):
        self.model = None
