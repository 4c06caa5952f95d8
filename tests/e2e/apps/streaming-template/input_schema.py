INPUT_SCHEMA = {
    "TEXT": {
        "datatype": "STRING",
        "required": True,
        "shape": [1],
        "example": ["What is Motet?"],
    }
}
IS_STREAMING_OUTPUT = True
