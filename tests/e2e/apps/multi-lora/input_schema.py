INPUT_SCHEMA = {
    "prompt": {"datatype": "STRING", "required": True, "shape": [1], "example": ["What is Motet?"]},
    "adapter_name": {"datatype": "STRING", "required": True, "shape": [1], "example": ["pirate"]},
    "temperature": {"datatype": "FP32", "required": False, "shape": [1], "example": [0.0]},
    "max_new_tokens": {"datatype": "INT16", "required": False, "shape": [1], "example": [16]},
}
