// prelude.cuh: what Metal gives the kernels in metal/, written in CUDA. backends/cuda.py puts it in front of their text,
// whose rules of translation stand there.
//
// The two headers come with CUDA, and NVRTC finds them where MLX's own kernels do. (The texts in metal/ include nothing:
// Apple's compiler gets no path.) All names are in a namespace, since CUDA has its own half2 and float4 outside.
// MLX compiles with --device-as-default-execution-space: a function without __device__ is one for the GPU.
//
// A simdgroup is a warp, and its lanes are threadIdx.x: every threadgroup is 32 threads wide. Lanes of a warp need not
// run in step, so a shuffle names the lanes that take part:
//   simd_shuffle_xor    the lane and its partner. Others may be elsewhere, as in Metal
//   the others          all 32. They must not be called where lanes have gone different ways
// Metal's threadgroups lie along y and z of the grid. CUDA allows 65,535 of them along y or z, and 2^31 - 1 along x: so
// y lies along x here. Threads beyond a grid that is no multiple of the threadgroup run, while Metal leaves them out.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define METAL_FUNC __device__ __forceinline__

namespace turbo {
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef __half half;
typedef __nv_bfloat16 bfloat16_t;

// Aligned as a whole: one load or store, as in Metal. With the operators that the kernels use.
template <class T, int N>
struct vec;
template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  METAL_FUNC explicit vec(T a) : x(a), y(a) {}
  METAL_FUNC vec(T a, T b) : x(a), y(b) {}
  METAL_FUNC T operator[](int i) const { return i == 0 ? x : y; }
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  METAL_FUNC explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  METAL_FUNC vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  METAL_FUNC T operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};
typedef vec<half, 2> half2;
typedef vec<half, 4> half4;
typedef vec<float, 2> float2;
typedef vec<float, 4> float4;
typedef vec<ushort, 2> ushort2;
typedef vec<uint, 2> uint2;
typedef vec<uint, 4> uint4;
struct uint3 {
  uint x, y, z;
};

template <class T>
METAL_FUNC vec<T, 4> &operator+=(vec<T, 4> &a, vec<T, 4> b) {
  a = vec<T, 4>(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  return a;
}
template <class TO, class FROM>
METAL_FUNC TO as_type(FROM from) {
  static_assert(sizeof(TO) == sizeof(FROM), "as_type: two types of one size");
  TO to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
METAL_FUNC half2 operator-(half2 a, half2 b) {
  return as_type<half2>(__hsub2(as_type<__half2>(a), as_type<__half2>(b)));
}
METAL_FUNC half2 operator*(half2 a, half2 b) {
  return as_type<half2>(__hmul2_rn(as_type<__half2>(a), as_type<__half2>(b)));
}
using ::fma;  // which the one of half2 would hide
METAL_FUNC half2 fma(half2 a, half2 b, half2 c) {
  return as_type<half2>(__hfma2(as_type<__half2>(a), as_type<__half2>(b), as_type<__half2>(c)));
}
template <class T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
namespace fast {
METAL_FUNC float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace fast

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
METAL_FUNC void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

constexpr uint ALL_LANES = 0xffffffffu;
template <class T>
METAL_FUNC T simd_shuffle_xor(T x, ushort mask) {
  uint lane = threadIdx.x;
  return __shfl_xor_sync(1u << lane | 1u << (lane ^ mask), x, mask);
}
template <class T>
METAL_FUNC T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}
template <class T>
METAL_FUNC T simd_broadcast(T x, ushort lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}
METAL_FUNC float simd_sum(float x) {
  _Pragma("unroll") for (int k = 16; k; k /= 2) x += __shfl_xor_sync(ALL_LANES, x, k);
  return x;
}
METAL_FUNC float simd_max(float x) {
  _Pragma("unroll") for (int k = 16; k; k /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, k));
  return x;
}

// ==== body
using namespace turbo;
using turbo::float2;
using turbo::float4;
using turbo::half2;
using turbo::uint2;
using turbo::uint3;
using turbo::uint4;
using turbo::ushort2;
const uint3 thread_position_in_threadgroup = {threadIdx.x, threadIdx.y, threadIdx.z};
const uint3 threadgroup_position_in_grid = {0, blockIdx.x, blockIdx.z};
const uint3 thread_position_in_grid = {threadIdx.x, blockIdx.x * blockDim.y + threadIdx.y,
                                       blockIdx.z * blockDim.z + threadIdx.z};
const uint thread_index_in_simdgroup = threadIdx.x;
const uint simdgroup_index_in_threadgroup = threadIdx.z * blockDim.y + threadIdx.y;
