// The C interface of the CPU runner: plain structs and functions, called through ctypes.
//
// The caller checks every size and range (octavo/runners/cpu) and keeps all memory it passes in alive until
// octavo_close; weights are read in place and never written. One thread calls at a time. Functions that can fail
// return a negative OctavoStatus. Shape letters: H query heads, KH kv heads, D head dim, N output rows,
// K input columns, R rank, V vocabulary.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define OCTAVO_API __declspec(dllexport)
#else
#define OCTAVO_API __attribute__((visibility("default")))
#endif

#define OCTAVO_ABI 5
#define OCTAVO_PAGE_TOKENS 32

enum OctavoStatus { OCTAVO_OK = 0, OCTAVO_OUT_OF_MEMORY = -1 };
enum OctavoIsa { OCTAVO_PORTABLE = 0, OCTAVO_AVX2 = 1, OCTAVO_AVX512 = 2, OCTAVO_ISAS = 3 };
enum OctavoNormKind { OCTAVO_NO_NORM = 0, OCTAVO_RMS = 1, OCTAVO_LAYERNORM = 2 };
enum OctavoActivation { OCTAVO_SILU = 0, OCTAVO_GELU = 1, OCTAVO_GELU_TANH = 2 };
// Codes as kernels/linear.inc lays them out: bits, whether groups have a minimum. T4: codes are places in a table.
enum OctavoCodec {
  OCTAVO_PLAIN_F32 = 0,
  OCTAVO_PLAIN_F16 = 1,
  OCTAVO_PLAIN_BF16 = 2,
  OCTAVO_U8 = 3,
  OCTAVO_U8_MIN = 4,
  OCTAVO_U4 = 5,
  OCTAVO_U4_MIN = 6,
  OCTAVO_T4 = 7
};
// How a group's scale and minimum are stored; 8-bit ones are times a binary16 that 256 columns share. F9Z7: both in a
// 16-bit word, bits 0 to 8 the scale 2^(e - 22) (1 + m / 16) with 4 bits of m, bits 9 to 15 the zero in eighths of a
// code; the minimum is -scale * zero.
enum OctavoNumbers {
  OCTAVO_NUMBERS_F16 = 0,
  OCTAVO_NUMBERS_F32 = 1,
  OCTAVO_NUMBERS_U8 = 2,
  OCTAVO_NUMBERS_I8 = 3,
  OCTAVO_NUMBERS_F9Z7 = 4
};

// What 4-bit codes stand for: weight = values[code] * scale; kernels compute with steps[code] * step, |steps| <= 2047.
typedef struct OctavoTable {
  float values[16];
  int16_t steps[16];
  float step;
} OctavoTable;

typedef struct OctavoMatrix {
  const uint8_t* blocks;  // null: there is no such matrix
  const float* bias;      // [N] or null
  const OctavoTable* table;  // of T4
  int64_t block_bytes;    // from one block of rows to the next
  int32_t rows;
  int32_t columns;
  int32_t codec;
  int32_t numbers;
  int32_t group;  // columns a scale covers, a multiple of 16
  int32_t int8_activations;  // 8-bit codes in groups of whole 32s: multiplied with int8 instead of int16
} OctavoMatrix;

typedef struct OctavoNorm {
  const float* gain;
  const float* bias;  // or null
  int32_t kind;
  float eps;
} OctavoNorm;

typedef struct OctavoExpert {
  OctavoMatrix gate, up, down;
} OctavoExpert;

typedef struct OctavoLayer {
  OctavoNorm pre_mixer, post_mixer, pre_ffn, post_ffn, q_norm, k_norm;
  OctavoMatrix q, k, v, o, gate, up, down;  // gate: absent where the MLP is not gated
  OctavoMatrix router;          // absent where the MLP is dense; else gate, up and down are, and there are
  const OctavoExpert* experts;  // [expert_count], all of one shape
  float residual_multiplier;
  float score_scale;
  float score_softcap;  // 0: none
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t window;    // 0: none
  int32_t rope;      // index, -1: none
  int32_t qk_norm_full;
  int32_t activation;
  int32_t kv_group;
  int32_t parallel;  // attention and MLP side by side; a pre_ffn that is absent is then pre_mixer
  int32_t expert_count;
  int32_t experts_per_token;
  int32_t normalized;  // the weights of a token's experts are divided by their sum
} OctavoLayer;

typedef struct OctavoRope {
  const float* inverse_frequencies;  // [pairs]
  int32_t pairs;
  float attention_factor;
} OctavoRope;

typedef struct OctavoModel {
  OctavoMatrix embedding;
  OctavoMatrix head;  // the embedding's blocks where tied
  OctavoNorm final_norm;
  const OctavoLayer* layers;
  const OctavoRope* ropes;
  const int32_t* kv_pages;  // [kv_groups]
  int32_t layer_count;
  int32_t rope_count;
  int32_t kv_groups;
  int32_t vocab_size;
  int32_t hidden_size;
  float embedding_multiplier;
  float logits_multiplier;
  float final_softcap;  // 0: none
  int32_t max_slots;
  int32_t row_capacity;  // tokens computed at a time; longer batches are computed in parts
  int32_t isa;
  int32_t threads;
} OctavoModel;

// Linears of a layer, in the order of an adapter's addends.
enum OctavoLinear {
  OCTAVO_Q = 0,
  OCTAVO_K = 1,
  OCTAVO_V = 2,
  OCTAVO_O = 3,
  OCTAVO_GATE = 4,
  OCTAVO_UP = 5,
  OCTAVO_DOWN = 6,
  OCTAVO_LINEARS = 7
};

// y += (x a^T) b
typedef struct OctavoAddend {
  const float* a;  // [R, K]
  const float* b;  // [R, N]
  int32_t rank;    // 0: none
  int32_t columns;
  int32_t rows;
} OctavoAddend;

typedef struct OctavoAdapter {
  const OctavoAddend* addends;  // [layers * OCTAVO_LINEARS + 1]: of each layer's linears, then of the head
  int32_t rank;                 // the largest
} OctavoAdapter;

typedef struct OctavoSampling {
  float temperature, top_p, min_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
  uint64_t seed;
  uint32_t choice;
  int32_t top_k;
  const int32_t* bias_ids;
  const float* bias_values;
  int32_t bias_count;
} OctavoSampling;

// Where logprobs go; null pointers and a top of 0 where none are wanted.
typedef struct OctavoLogprobs {
  float* logprobs;  // [rows]
  int32_t* top_ids;     // [rows, top]
  float* top_logprobs;  // [rows, top]
  int32_t top;
} OctavoLogprobs;

typedef struct OctavoChunk {
  const int32_t* token_ids;  // [tokens]; null: the slot's last token
  const int32_t* const* page_tables;  // [kv_groups], each [ceil((start + tokens) / 32)]
  const int32_t* targets;    // [tokens] or null; -1: none for this row
  OctavoLogprobs prompt;     // rows of the chunk
  int32_t slot;
  int32_t start;
  int32_t tokens;
  int32_t sample;  // keep the logits of the last drafts + 1 rows
  int32_t drafts;
} OctavoChunk;

// Samples the rows a chunk kept, one after the other, until a token is not the draft it was guessed to be.
typedef struct OctavoSample {
  const uint32_t* mask;  // [ceil(V / 32)] or null; goes with no drafts, as `logits` does
  const float* logits;   // [V] to sample from instead of the model's, or null; logprobs stay the model's
  const int32_t* draft_ids;  // [drafts]
  int32_t* token_ids;        // [drafts + 1], out; -1: the logits are not finite
  OctavoLogprobs logprobs;   // drafts + 1 rows
  int32_t slot;
  int32_t drafts;
  int32_t tokens;  // out: how many there are
} OctavoSample;

typedef struct OctavoRunner OctavoRunner;

// ABI version, then the size in bytes of each struct above in order: [14]
OCTAVO_API void octavo_abi(int32_t* out);
OCTAVO_API int32_t octavo_isa_supported(int32_t isa);
OCTAVO_API int32_t octavo_isa_lanes(int32_t isa);

// Null where memory does not suffice. Copies the structs, not the weights.
OCTAVO_API OctavoRunner* octavo_open(const OctavoModel* model);
OCTAVO_API void octavo_close(OctavoRunner* runner);
// kv, activations: bytes allocated
OCTAVO_API void octavo_memory(const OctavoRunner* runner, int64_t* kv_bytes, int64_t* activation_bytes);

// `adapter` stays alive until the slot is closed; null: none.
OCTAVO_API int32_t octavo_open_slot(OctavoRunner* runner, int32_t slot, const OctavoSampling* sampling,
                                    const int32_t* token_ids, int32_t tokens, int32_t prompt_tokens,
                                    const OctavoAdapter* adapter);
OCTAVO_API void octavo_close_slot(OctavoRunner* runner, int32_t slot);
OCTAVO_API int32_t octavo_forward(OctavoRunner* runner, const OctavoChunk* chunks, int32_t count);
// The logits of the first row that the last octavo_forward kept for a slot, fp32 [V].
OCTAVO_API const float* octavo_logits(const OctavoRunner* runner, int32_t slot);
OCTAVO_API int32_t octavo_sample(OctavoRunner* runner, OctavoSample* samples, int32_t count);

// Reads `bytes` of memory `rounds` times on all threads together; fills bytes_per_second [rounds].
OCTAVO_API int32_t octavo_read_bandwidth(int32_t threads, int64_t bytes, int32_t rounds, double* bytes_per_second);

// Single kernels, for tests: x fp32 [T, K] -> y fp32 [T, N].
OCTAVO_API int32_t octavo_test_linear(int32_t isa, const OctavoMatrix* w, const float* x, int32_t rows, float* y);
OCTAVO_API int32_t octavo_test_row(int32_t isa, const OctavoMatrix* w, int32_t row, float* out);
OCTAVO_API void octavo_test_norm(int32_t isa, const OctavoNorm* norm, const float* x, int32_t n, float* out);
OCTAVO_API void octavo_test_activate(int32_t isa, float* x, int32_t n, int32_t activation);
OCTAVO_API int32_t octavo_test_sample(int32_t isa, const OctavoSampling* sampling, const float* logits, int32_t vocab,
                                      const int32_t* token_ids, int32_t tokens, int32_t prompt_tokens,
                                      OctavoSample* sample);

#ifdef __cplusplus
}
#endif
