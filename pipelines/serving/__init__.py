"""
Serving a GGUF: which engine, the files it reads, and the server itself.

    engine          which program serves here, and how it came to be here
    ollama_install  Ollama in our cache: built by Go, or from the release archive
    modelfile       the template of a Modelfile -> directives -> text for people, layers for Ollama
    ollama_store    those layers and the GGUF, laid where Ollama looks for a model
    sandbox         a private place for a server, and its end
    server          what all servers have in common; ollama and llama_server are the two
"""
