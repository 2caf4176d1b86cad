import gradio as gr

from llama_space import Engine, LoaderError, guard

engine = Engine()  # reads the Space's variables: LLAMA_SPACE_GGUF_REPO_ID names the model (README)


def respond(message, history):  # streams the answer: with the page below the whole Space
    asked, text = [*history, {"role": "user", "content": message}], ""
    if len(str(asked)) > engine.settings.max_chars:
        raise gr.Error("This chat is too long: begin a new one.", print_exception=False)
    try:
        for piece in engine.chat(asked, max_tokens=engine.settings.max_new_tokens or 512):
            yield (text := text + piece)
    except LoaderError as error:  # its code, hint and paths are for the log, where gradio prints it
        raise gr.Error(error.for_visitors) from error


page = gr.ChatInterface(respond).queue(default_concurrency_limit=3, max_size=20)
page.launch(**guard.options(engine.settings.max_chars))  # texts alone: no files, no other routes
