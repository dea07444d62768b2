// tensor.h: a view of numbers in host or device memory. Views own nothing.
//
// Row-major. The innermost dimensions are contiguous; only the first may have gaps: consecutive entries of n[0] lie
// ld elements apart. So a block of rows or (for 2-d) of columns of a tensor is again a tensor.
#ifndef DITFLEET_TENSOR_H
#define DITFLEET_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype { DT_F32, DT_BF16, DT_F16, DT_F64, DT_I32, DT_I64, DT_U8, DT_E4M3, DT_I8, DT_COUNT };

// Numbers of 8 bits, each row with a factor of its own.
static inline bool dtype_quantised(enum dtype dtype)
{
    return dtype == DT_E4M3 || dtype == DT_I8;
}

size_t dtype_size(enum dtype dtype);
const char *dtype_name(enum dtype dtype); // as safetensors spells it: "F32", "BF16", ...

#define TENSOR_MAX_DIMS 4

struct tensor {
    void *data;
    enum dtype dtype;
    int dims;                   // 1 to TENSOR_MAX_DIMS; 0: no tensor (optional arguments)
    int64_t n[TENSOR_MAX_DIMS]; // n[dims] and beyond are 1
    int64_t ld;                 // elements from one entry of n[0] to the next
    float *scale;               // E4M3 and I8: each row's numbers are to be multiplied by scale[row]; else NULL
};

static inline bool tensor_none(struct tensor t)
{
    return t.dims == 0;
}

// A contiguous tensor over data; pass 1 for the dimensions beyond dims.
struct tensor tensor_of(void *data, enum dtype dtype, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3);

static inline struct tensor tensor_1d(void *data, enum dtype dtype, int64_t n0)
{
    return tensor_of(data, dtype, 1, n0, 1, 1, 1);
}

static inline struct tensor tensor_2d(void *data, enum dtype dtype, int64_t n0, int64_t n1)
{
    return tensor_of(data, dtype, 2, n0, n1, 1, 1);
}

int64_t tensor_count(struct tensor t);                                    // elements seen through the view
size_t tensor_bytes(struct tensor t);                                     // their bytes, gaps not counted
struct tensor tensor_rows(struct tensor t, int64_t start, int64_t count); // entries start.. of n[0]
struct tensor tensor_cols(struct tensor t, int64_t start, int64_t count); // columns start.. of a 2-d tensor
struct tensor tensor_reshape(struct tensor t, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3);
// tensor_reshape: splits or merges inner dimensions; n[0] must stay when the view has gaps.

// Conversions of single numbers; round to nearest even.
float bf16_to_f32(uint16_t h);
uint16_t f32_to_bf16(float f);
float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f);

#endif
