"""How a handler is put on the network: by TorchServe, or by Starlette and uvicorn."""
