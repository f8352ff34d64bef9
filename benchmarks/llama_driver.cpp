// Times llama.cpp through its C API on random token ids, as benchmarks/peers.py times the others.
//
//   llama_driver quantize IN.gguf OUT.gguf FTYPE
//   llama_driver serve MODEL.gguf THREADS
//
// `serve` speaks the protocol of peer_worker.py: it prints "ready", and for every line "STREAMS CONTEXT TOKENS" on
// standard input it computes CONTEXT prompt tokens of each of STREAMS sequences, then TOKENS greedy steps of all of
// them together, and prints {"prefill_seconds": ..., "decode_seconds": ...}.

#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static void add(llama_batch & batch, llama_token token, int position, int sequence, bool wants_logits) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = wants_logits;
}

static void check(int status, const char * what) {
    if (status != 0) {
        std::fprintf(stderr, "llama_driver: %s failed with %d\n", what, status);
        std::exit(1);
    }
}

struct Seconds {
    double prefill, decode;
};

static Seconds round_of(llama_context * ctx, int vocab_size, int streams, int context, int tokens, int seed) {
    std::mt19937 random(seed);
    llama_batch batch = llama_batch_init(std::max(context, streams), 0, 1);
    std::vector<llama_token> next(streams);
    const auto best = [&](int row) {
        const float * logits = llama_get_logits_ith(ctx, row);
        return llama_token(std::max_element(logits, logits + vocab_size) - logits);
    };
    const double start = now();
    for (int s = 0; s < streams; ++s) {
        batch.n_tokens = 0;
        for (int p = 0; p < context; ++p) add(batch, random() % vocab_size, p, s, p == context - 1);
        check(llama_decode(ctx, batch), "prefill");
        next[s] = best(-1);
    }
    const double middle = now();
    for (int t = 0; t < tokens; ++t) {
        batch.n_tokens = 0;
        for (int s = 0; s < streams; ++s) add(batch, next[s], context + t, s, true);
        check(llama_decode(ctx, batch), "decode");
        for (int s = 0; s < streams; ++s) next[s] = best(s);
    }
    const double end = now();
    llama_batch_free(batch);
    return {middle - start, end - middle};
}

static int serve(const char * path, int threads) {
    llama_model * model = llama_model_load_from_file(path, llama_model_default_params());
    if (model == nullptr) return 1;
    const int vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::printf("ready\n");
    std::fflush(stdout);
    char line[64];
    for (int seed = 1; std::fgets(line, sizeof line, stdin) != nullptr; ++seed) {
        int streams = 0, context = 0, tokens = 0;
        if (std::sscanf(line, "%d %d %d", &streams, &context, &tokens) != 3) return 2;
        llama_context_params params = llama_context_default_params();
        params.n_ctx = streams * (context + tokens + 64);
        params.n_batch = 2048;
        params.n_ubatch = 512;
        params.n_seq_max = streams;
        params.n_threads = params.n_threads_batch = threads;
        llama_context * ctx = llama_init_from_model(model, params);
        if (ctx == nullptr) return 1;
        const Seconds seconds = round_of(ctx, vocab_size, streams, context, tokens, seed);
        llama_free(ctx);
        std::printf("{\"prefill_seconds\": %.6f, \"decode_seconds\": %.6f}\n", seconds.prefill, seconds.decode);
        std::fflush(stdout);
    }
    return 0;
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    if (argc == 5 && std::strcmp(argv[1], "quantize") == 0) {
        llama_model_quantize_params params = llama_model_quantize_default_params();
        params.ftype = llama_ftype(std::atoi(argv[4]));
        return int(llama_model_quantize(argv[2], argv[3], &params));
    }
    if (argc == 4 && std::strcmp(argv[1], "serve") == 0) return serve(argv[2], std::atoi(argv[3]));
    std::fprintf(stderr, "usage: llama_driver quantize IN OUT FTYPE | serve MODEL THREADS\n");
    return 2;
}
