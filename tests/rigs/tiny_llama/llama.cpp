const char * llama_where() { return __FILE__; }
