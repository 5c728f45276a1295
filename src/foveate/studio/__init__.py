"""Pages in the browser. Gradio is imported where it is used: it takes seconds."""
