int ggml_backend_score(void) { return 1; }
