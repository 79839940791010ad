// Stand-in for <metal_stdlib> and MLX's kernel preamble: lets clang compile MSL text for the host.
// Address spaces are real clang address spaces, so mixing them up is a compile error, as in MSL.
// The #line directives name the parts: instrument.py does not count the instructions of "msl-simd".
#pragma clang system_header
#define thread
#define kernel
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
// Pointers of 32 bits, as on Apple GPUs; instrument.py lets the memory begin at address 0, as it does there.
#define threadgroup __attribute__((address_space(271)))
#define METAL_FUNC inline __attribute__((always_inline))
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
// The line of the call, through any number of defaulted parameters.
#define MSL_LINE unsigned line = __builtin_LINE()
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX 65504.0f16
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;
#define MSL_VECTORS(T)                              \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat)
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short) MSL_VECTORS(ushort)
MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(long) MSL_VECTORS(ulong)

// ---- what runtime.cpp provides ------------------------------------------------------------------
namespace msl {
struct Exchange {
  alignas(16) uchar lane[32][16];
  alignas(16) uchar result[16];
  uint mask, done;
};
struct Attributes { uint value[20][4]; };
}
extern "C" {
__attribute__((convergent)) msl::Exchange *msl_exchange(const void *operand, uint n_bytes, uint may_diverge, uint line);
__attribute__((convergent)) void msl_barrier(int is_simdgroup, int flags, uint line);
__attribute__((noreturn)) void msl_fail(const char *what, uint line);
uint msl_lane();
}

// ---- type traits --------------------------------------------------------------------------------
namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T, T V> struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> constexpr bool is_same_v = __is_same(A, B);
template <bool B, class X, class Y> struct conditional { using type = X; };
template <class X, class Y> struct conditional<false, X, Y> { using type = Y; };
template <bool B, class X, class Y> using conditional_t = typename conditional<B, X, Y>::type;
template <class T> struct type_identity { using type = T; };
#define MSL_STRIP(name, ...)                       \
  template <class T> struct name : type_identity<T> {}; \
  __VA_ARGS__                                      \
  template <class T> using name##_t = typename name<T>::type;
MSL_STRIP(remove_const, template <class T> struct remove_const<const T> : type_identity<T> {};)
MSL_STRIP(remove_volatile, template <class T> struct remove_volatile<volatile T> : type_identity<T> {};)
template <class T> struct remove_cv : remove_const<remove_volatile_t<T>> {};
template <class T> using remove_cv_t = typename remove_cv<T>::type;
MSL_STRIP(remove_reference,
          template <class T> struct remove_reference<T &> : type_identity<T> {};
          template <class T> struct remove_reference<T &&> : type_identity<T> {};)
MSL_STRIP(remove_addrspace,
          template <class T> struct remove_addrspace<device T> : type_identity<T> {};
          template <class T>
          struct remove_addrspace<__attribute__((address_space(2))) T> : type_identity<T> {};
          template <class T> struct remove_addrspace<threadgroup T> : type_identity<T> {};)
template <class T> T &&declval();
template <class T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> constexpr bool is_integral_v = __is_integral(T);
template <class T> constexpr bool is_unsigned_v = __is_integral(T) && T(-1) > T(0);
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
}

// ---- vector conversions, which translate.py spells out; kernel arguments ------------------------
namespace msl {
using namespace metal;
template <class T> struct Vector { using element = T; static constexpr int n = 0; };
template <class T, int N> struct Vector<vec<T, N>> { using element = T; static constexpr int n = N; };
template <class V, class A> METAL_FUNC void append(V &v, int &i, A a) {
  using E = typename Vector<V>::element;
  if constexpr (Vector<A>::n > 0) {
    for (int k = 0; k < Vector<A>::n; k++) v[i++] = (E)a[k];
  } else {
    v[i++] = (E)a;
  }
}
// float4(a, b, c, d), float4(xy, z, w), float4(s), half4(float4_value)
template <class V, class A, class... R> METAL_FUNC V make(A a, R... r) {
  if constexpr (Vector<V>::n == 0) {
    return (V)a;
  } else if constexpr (sizeof...(R) == 0 && Vector<A>::n == 0) {
    return (V)(typename Vector<V>::element)a;
  } else {
    V v;
    int i = 0;
    append(v, i, a);
    (append(v, i, r), ...);
    return v;
  }
}
template <class V> METAL_FUNC V make() { return V{}; }
// (float4)x is written Cast<float4>() ->* x, which binds as tightly as a cast
template <class V> struct Cast {};
template <class V, class A> METAL_FUNC V operator->*(Cast<V>, A a) { return make<V>(a); }
template <class T, class A> METAL_FUNC T static_convert(A a) {
  if constexpr (Vector<A>::n > 0) return make<T>(a);
  else return static_cast<T>(a);
}

template <class A> struct Argument {
  template <class U> static A get(U v) {
    if constexpr (Vector<A>::n == 0) {
      return (A)v[0];
    } else {
      A r;
      for (int i = 0; i < Vector<A>::n; i++) r[i] = (typename Vector<A>::element)v[i];
      return r;
    }
  }
};
template <class T> struct Argument<T *> { static T *get(void *p) { return (T *)(ulong)p; } };
template <class T> struct Argument<T &> { static T &get(void *p) { return *(T *)(ulong)p; } };
template <class... A, class... B> METAL_FUNC void call(void (*f)(A...), B... b) { f(Argument<A>::get(b)...); }
}

namespace metal {
enum mem_flags {
  mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8
};
// ---- math ---------------------------------------------------------------------------------------
// float/half/bfloat overloads (an int argument is ambiguous, as in MSL) and an element-wise vector form.
#define MSL_F1(name, expression)                                                        \
  METAL_FUNC float name(float x) { return expression; }                                 \
  METAL_FUNC half name(half x) { return (half)name((float)x); }                         \
  METAL_FUNC bfloat name(bfloat x) { return (bfloat)name((float)x); }                   \
  template <class T, int N> METAL_FUNC vec<T, N> name(vec<T, N> v) {                    \
    for (int i = 0; i < N; i++) v[i] = name((T)v[i]);                                   \
    return v;                                                                           \
  }
#define MSL_F2(name, expression)                                                        \
  METAL_FUNC float name(float x, float y) { return expression; }                        \
  METAL_FUNC half name(half x, half y) { return (half)name((float)x, (float)y); }       \
  METAL_FUNC bfloat name(bfloat x, bfloat y) { return (bfloat)name((float)x, (float)y); } \
  template <class T, int N> METAL_FUNC vec<T, N> name(vec<T, N> v, vec<T, N> w) {       \
    for (int i = 0; i < N; i++) v[i] = name((T)v[i], (T)w[i]);                          \
    return v;                                                                           \
  }
#define MSL_MATH                                                                        \
  MSL_F1(exp, __builtin_expf(x)) MSL_F1(exp2, __builtin_exp2f(x))                       \
  MSL_F1(exp10, __builtin_powf(10.0f, x))                                               \
  MSL_F1(log, __builtin_logf(x)) MSL_F1(log2, __builtin_log2f(x)) MSL_F1(log10, __builtin_log10f(x)) \
  MSL_F1(sin, __builtin_sinf(x)) MSL_F1(cos, __builtin_cosf(x)) MSL_F1(tan, __builtin_tanf(x)) \
  MSL_F1(sinh, __builtin_sinhf(x)) MSL_F1(cosh, __builtin_coshf(x)) MSL_F1(tanh, __builtin_tanhf(x)) \
  MSL_F1(asin, __builtin_asinf(x)) MSL_F1(acos, __builtin_acosf(x)) MSL_F1(atan, __builtin_atanf(x)) \
  MSL_F1(asinh, __builtin_asinhf(x)) MSL_F1(acosh, __builtin_acoshf(x)) MSL_F1(atanh, __builtin_atanhf(x)) \
  MSL_F1(sqrt, __builtin_sqrtf(x)) MSL_F1(rsqrt, 1.0f / __builtin_sqrtf(x))             \
  MSL_F1(floor, __builtin_floorf(x)) MSL_F1(ceil, __builtin_ceilf(x)) MSL_F1(trunc, __builtin_truncf(x)) \
  MSL_F1(round, __builtin_roundf(x)) MSL_F1(rint, __builtin_rintf(x))                   \
  MSL_F1(fract, x - __builtin_floorf(x)) MSL_F1(fabs, __builtin_fabsf(x))               \
  MSL_F1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f) MSL_F1(saturate, x < 0 ? 0.0f : x > 1 ? 1.0f : x) \
  MSL_F2(pow, __builtin_powf(x, y)) MSL_F2(powr, __builtin_powf(x, y))                  \
  MSL_F2(atan2, __builtin_atan2f(x, y)) MSL_F2(fmod, __builtin_fmodf(x, y))             \
  MSL_F2(fmin, __builtin_fminf(x, y)) MSL_F2(fmax, __builtin_fmaxf(x, y))               \
  MSL_F2(copysign, __builtin_copysignf(x, y)) MSL_F2(divide, x / y)                     \
  MSL_F2(step, y < x ? 0.0f : 1.0f) MSL_F2(fdim, __builtin_fdimf(x, y))
MSL_MATH
namespace fast { MSL_MATH }
namespace precise { MSL_MATH }
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return __builtin_elementwise_fma(a, b, c); }
template <class T, int N> METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a[i] = fma((T)a[i], (T)b[i], (T)c[i]);
  return a;
}
METAL_FUNC float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
METAL_FUNC float frexp(float x, int &e) { return __builtin_frexpf(x, &e); }
METAL_FUNC bool isnan(float x) { return __builtin_isnan(x); }
METAL_FUNC bool isinf(float x) { return __builtin_isinf(x); }
METAL_FUNC bool isfinite(float x) { return __builtin_isfinite(x); }
METAL_FUNC bool signbit(float x) { return __builtin_signbit(x); }
// Opens a function body: returns the element-wise result for a vector T; the scalar case follows.
#define MSL_ELEMENTWISE(element)                                        \
  {                                                                     \
    if constexpr (msl::Vector<T>::n > 0) {                              \
      T r;                                                              \
      for (int i = 0; i < msl::Vector<T>::n; i++) r[i] = element;       \
      return r;                                                         \
    } else
template <class T> METAL_FUNC T min(T a, T b)
  MSL_ELEMENTWISE(b[i] < a[i] ? b[i] : a[i]) return b < a ? b : a; }
template <class T> METAL_FUNC T max(T a, T b)
  MSL_ELEMENTWISE(a[i] < b[i] ? b[i] : a[i]) return a < b ? b : a; }
template <class T> METAL_FUNC T abs(T a)
  MSL_ELEMENTWISE(a[i] < 0 ? -a[i] : a[i]) return a < T(0) ? T(-a) : a; }
template <class T> METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T, int N> METAL_FUNC vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return clamp(x, vec<T, N>(low), vec<T, N>(high));
}
template <class T> METAL_FUNC T min3(T a, T b, T c) { return min(a, min(b, c)); }
template <class T> METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }
template <class T> METAL_FUNC T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class T, class C, int N> METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];
  return a;
}
template <class T, int N> METAL_FUNC bool any(vec<T, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= c[i] != 0;
  return r;
}
template <class T, int N> METAL_FUNC bool all(vec<T, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= c[i] != 0;
  return r;
}
template <class T, int N> METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r += a[i] * b[i];
  return r;
}
template <class T, int N> METAL_FUNC T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> METAL_FUNC vec<T, N> normalize(vec<T, N> a) { return a * rsqrt(dot(a, a)); }
// ---- integers and bits --------------------------------------------------------------------------
template <class To, class From> METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, x);
}
template <class T> METAL_FUNC ulong zero_extended(T x) { return (ulong)x & (~0ul >> (64 - 8 * sizeof(T))); }
template <class T> METAL_FUNC T popcount(T x) MSL_ELEMENTWISE(popcount(x[i]))
  return (T)__builtin_popcountg(zero_extended(x)); }
template <class T> METAL_FUNC T clz(T x) {
  constexpr int bits = 8 * sizeof(T);
  return x ? (T)(__builtin_clzl(zero_extended(x)) - (64 - bits)) : (T)bits;
}
template <class T> METAL_FUNC T ctz(T x) { return x ? (T)__builtin_ctzl((ulong)x) : (T)(8 * sizeof(T)); }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
template <class T> METAL_FUNC T mad24(T a, T b, T c) { return a * b + c; }
METAL_FUNC uint rotate(uint x, uint n) {
  n &= 31;
  return n ? (x << n) | (x >> (32 - n)) : x;
}
METAL_FUNC uint extract_bits(uint x, uint offset, uint n) {
  return n == 0 ? 0u : (x >> offset) & (n >= 32 ? ~0u : (1u << n) - 1u);
}
METAL_FUNC int extract_bits(int x, uint offset, uint n) {
  return n == 0 ? 0 : (int)((uint)x << (32 - offset - n)) >> (32 - n);
}
METAL_FUNC uint insert_bits(uint base, uint insert, uint offset, uint n) {
  uint m = (n >= 32 ? ~0u : (1u << n) - 1u) << offset;
  return (base & ~m) | ((insert << offset) & m);
}
template <class T> struct numeric_limits {
  static constexpr T signed_max = (T)(~0ul >> (65 - 8 * sizeof(T)));
  static constexpr T max() { return (T(-1) > T(0)) ? T(-1) : signed_max; }
  static constexpr T min() { return (T(-1) > T(0)) ? T(0) : (T)(-(long)signed_max - 1); }
};
#define MSL_FLOAT_LIMITS(T, largest, smallest, ulp)                     \
  template <> struct numeric_limits<T> {                                \
    static constexpr T max() { return (T)largest; }                     \
    static constexpr T min() { return (T)smallest; }                    \
    static constexpr T lowest() { return (T)-largest; }                 \
    static constexpr T epsilon() { return (T)ulp; }                     \
    static constexpr T infinity() { return (T)__builtin_inff(); }       \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }    \
  };
MSL_FLOAT_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f, 1.192092896e-07f)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e+38f, 1.175494351e-38f, 7.8125e-03f)
// ---- barriers and simdgroup functions -----------------------------------------------------------
#line 1 "msl-simd"
METAL_FUNC void threadgroup_barrier(mem_flags flags, MSL_LINE) { msl_barrier(0, flags, line); }
METAL_FUNC void simdgroup_barrier(mem_flags flags, MSL_LINE) { msl_barrier(1, flags, line); }
}
namespace msl {
template <class T> METAL_FUNC void check_operand() {
  static_assert(sizeof(typename Vector<T>::element) < 8, "simdgroup functions take no types of 64 bits");
}
template <class T> METAL_FUNC Exchange *exchange(T &x, uint line, bool may_diverge = false) {
  check_operand<T>();
  return msl_exchange(&x, sizeof(T), may_diverge, line);
}
template <class T> METAL_FUNC T from_lane(Exchange *e, uint lane) {
  T r;
  __builtin_memcpy(&r, e->lane[lane], sizeof(T));
  return r;
}
METAL_FUNC uint lowest_lane(uint mask) { return __builtin_ctz(mask); }
#ifdef MSL_CODE_SIZE  // nothing runs: a simdgroup function is one call
template <class T> __attribute__((convergent, const)) T code_of(T x, uint n);
template <class T> METAL_FUNC T on_gpu(T x, uint n = 0) {
  check_operand<T>();
  return code_of(x, n);
}
template <class T, class F> METAL_FUNC T reduce(T x, uint line, F f) { return on_gpu(x); }
template <class T, class F> METAL_FUNC T reduce_quad(T x, uint line, F f) { return on_gpu(x); }
template <class T, class F> METAL_FUNC T scan(T x, T, bool, uint line, F f) { return on_gpu(x); }
template <class T> METAL_FUNC T from_first(T x, uint line) { return on_gpu(x); }
METAL_FUNC ulong2 ballot(bool p, uint line) { return {(ulong)on_gpu((uint)p), ~0u}; }
METAL_FUNC bool is_first(uint line) { return on_gpu(true); }
METAL_FUNC float2 multiply(float4 ab, float2 c, uint line) { return on_gpu(ab).xy + c; }
#else
// Over the active lanes of the simdgroup in lane order; the first lane to get here computes it for all.
template <class T, class F> METAL_FUNC T reduce(T x, uint line, F f) {
  Exchange *e = exchange(x, line);
  if (e->done) {
    __builtin_memcpy(&x, e->result, sizeof(T));
    return x;
  }
  uint mask = e->mask;
  T r = from_lane<T>(e, lowest_lane(mask));
  for (mask &= mask - 1; mask; mask &= mask - 1) r = f(r, from_lane<T>(e, lowest_lane(mask)));
  __builtin_memcpy(e->result, &r, sizeof(T));
  e->done = 1;
  return r;
}
template <class T, class F> METAL_FUNC T reduce_quad(T x, uint line, F f) {
  Exchange *e = exchange(x, line);
  uint first = msl_lane() & 28, mask = (e->mask >> first) & 15;
  T r = from_lane<T>(e, first + lowest_lane(mask));
  for (mask &= mask - 1; mask; mask &= mask - 1) r = f(r, from_lane<T>(e, first + lowest_lane(mask)));
  return r;
}
template <class T, class F> METAL_FUNC T scan(T x, T identity, bool inclusive, uint line, F f) {
  Exchange *e = exchange(x, line);
  T r = identity;
  for (uint l = 0; l < msl_lane() + inclusive; l++)
    if (e->mask >> l & 1) r = f(r, from_lane<T>(e, l));
  return r;
}
template <class T> METAL_FUNC T read(T x, int lane, bool in_range, uint line) {
  Exchange *e = exchange(x, line, true);
  if (!in_range) return x;
  if (!(e->mask >> lane & 1)) msl_fail("shuffle reads an inactive lane", line);
  return from_lane<T>(e, lane);
}
METAL_FUNC uint quad_lane(uint lane) { return (msl_lane() & 28) | (lane & 3); }
template <class T> METAL_FUNC T from_first(T x, uint line) {
  Exchange *e = exchange(x, line);
  return from_lane<T>(e, lowest_lane(e->mask));
}
METAL_FUNC ulong2 ballot(bool p, uint line) {  // who voted so, and who voted
  Exchange *e = exchange(p, line);
  ulong voted = 0;
  for (uint l = 0; l < 32; l++)
    if (e->mask >> l & 1) voted |= (ulong)e->lane[l][0] << l;
  return {voted, e->mask};
}
METAL_FUNC bool is_first(uint line) {
  bool p = true;
  return msl_lane() == lowest_lane(exchange(p, line)->mask);
}
#endif
}
namespace metal {
#define MSL_REDUCTION(name, expression)                                             \
  template <class T> METAL_FUNC T simd_##name(T x, MSL_LINE) {                      \
    return msl::reduce(x, line, [](T a, T b) -> T { return expression; });          \
  }                                                                                 \
  template <class T> METAL_FUNC T quad_##name(T x, MSL_LINE) {                      \
    return msl::reduce_quad(x, line, [](T a, T b) -> T { return expression; });     \
  }
MSL_REDUCTION(sum, a + b) MSL_REDUCTION(product, a * b)
MSL_REDUCTION(max, metal::max(a, b)) MSL_REDUCTION(min, metal::min(a, b))
MSL_REDUCTION(and, a & b) MSL_REDUCTION(or, a | b) MSL_REDUCTION(xor, a ^ b)
#define MSL_PREFIX(name, identity, expression)                                      \
  template <class T> METAL_FUNC T simd_prefix_inclusive_##name(T x, MSL_LINE) {     \
    return msl::scan(x, T(identity), true, line, [](T a, T b) -> T { return expression; });  \
  }                                                                                 \
  template <class T> METAL_FUNC T simd_prefix_exclusive_##name(T x, MSL_LINE) {     \
    return msl::scan(x, T(identity), false, line, [](T a, T b) -> T { return expression; }); \
  }
MSL_PREFIX(sum, 0, a + b) MSL_PREFIX(product, 1, a * b)
#ifdef MSL_CODE_SIZE
#define MSL_SHUFFLE(name, lane, in_range)                                           \
  template <class T> METAL_FUNC T name(T x, ushort n, MSL_LINE) { return msl::on_gpu(x, n); }
#else
#define MSL_SHUFFLE(name, lane, in_range)                                           \
  template <class T> METAL_FUNC T name(T x, ushort n, MSL_LINE) { return msl::read(x, lane, in_range, line); }
#endif
MSL_SHUFFLE(simd_shuffle, n & 31, n < 32)
MSL_SHUFFLE(simd_broadcast, n & 31, n < 32)
MSL_SHUFFLE(simd_shuffle_xor, (msl_lane() ^ n) & 31, n < 32)
MSL_SHUFFLE(simd_shuffle_up, (int)msl_lane() - n, (int)msl_lane() >= n)
MSL_SHUFFLE(simd_shuffle_down, (msl_lane() + n) & 31, msl_lane() + n < 32)
MSL_SHUFFLE(simd_shuffle_rotate_up, (msl_lane() - n) & 31, true)
MSL_SHUFFLE(simd_shuffle_rotate_down, (msl_lane() + n) & 31, true)
MSL_SHUFFLE(quad_shuffle, msl::quad_lane(n), true)
MSL_SHUFFLE(quad_broadcast, msl::quad_lane(n), true)
MSL_SHUFFLE(quad_shuffle_xor, msl::quad_lane(msl_lane() ^ n), true)
template <class T> METAL_FUNC T simd_broadcast_first(T x, MSL_LINE) { return msl::from_first(x, line); }
struct simd_vote {
  ulong voted, active;
  bool all() const { return voted == active; }
  bool any() const { return voted != 0; }
  explicit operator ulong() const { return voted; }
};
METAL_FUNC simd_vote simd_ballot(bool p, MSL_LINE) {
  ulong2 votes = msl::ballot(p, line);
  return {votes[0], votes[1]};
}
METAL_FUNC bool simd_all(bool p, MSL_LINE) { return simd_ballot(p, line).all(); }
METAL_FUNC bool simd_any(bool p, MSL_LINE) { return simd_ballot(p, line).any(); }
METAL_FUNC simd_vote simd_active_threads_mask(MSL_LINE) { return simd_ballot(true, line); }
METAL_FUNC bool simd_is_first(MSL_LINE) { return msl::is_first(line); }
// ---- 8x8 simdgroup matrices: each lane holds two neighbouring elements of one row ---------------
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  vec<T, 2> e;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T d) {
    for (int k = 0; k < 2; k++) e[k] = row(msl_lane()) == column(msl_lane()) + k ? d : T(0);
  }
  vec<T, 2> &thread_elements() { return e; }
  static uint row(uint l) { return (l >> 4 << 2) | ((l >> 1) & 3); }
  static uint column(uint l) { return ((l >> 3) & 1) << 2 | (l & 1) << 1; }
  static uint lane_of(uint r, uint c) {
    return (r >> 2) << 4 | (c >> 2) << 3 | (r & 3) << 1 | ((c >> 1) & 1);
  }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int R, int C> METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.e = v;
  return m;
}
METAL_FUNC ulong matrix_offset(uint r, uint c, ulong stride, ulong2 origin, bool transpose) {
  return transpose ? (origin.y + c) * stride + origin.x + r : (origin.y + r) * stride + origin.x + c;
}
#ifndef MSL_CODE_SIZE
}
namespace msl {
METAL_FUNC float2 multiply(float4 ab, float2 sum, uint line) {
  using M = simdgroup_matrix<float>;
  Exchange *e = exchange(ab, line);
  if (e->mask != ~0u) msl_fail("simdgroup_matrix operation with inactive lanes", line);
  uint row = M::row(msl_lane()), column = M::column(msl_lane());
  for (uint k = 0; k < 8; k++) {
    float x = from_lane<float4>(e, M::lane_of(row, k))[k & 1];
    float4 y = from_lane<float4>(e, M::lane_of(k, column));
    sum[0] += x * y[2];
    sum[1] += x * y[3];
  }
  return sum;
}
}
namespace metal {
#endif
template <class T, class P>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T> &m, P p, ulong stride = 8, ulong2 origin = ulong2(0),
                               bool transpose = false) {
  uint l = msl_lane();
  for (uint k = 0; k < 2; k++)
    m.e[k] = p[matrix_offset(m.row(l), m.column(l) + k, stride, origin, transpose)];
}
template <class T, class P>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T> m, P p, ulong stride = 8, ulong2 origin = ulong2(0),
                                bool transpose = false) {
  uint l = msl_lane();
  for (uint k = 0; k < 2; k++)
    p[matrix_offset(m.row(l), m.column(l) + k, stride, origin, transpose)] = m.e[k];
}
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D> &d, simdgroup_matrix<A> a,
                                              simdgroup_matrix<B> b, simdgroup_matrix<C> c, MSL_LINE) {
  float4 ab = {(float)a.e[0], (float)a.e[1], (float)b.e[0], (float)b.e[1]};
  float2 sum = msl::multiply(ab, {(float)c.e[0], (float)c.e[1]}, line);
  d.e[0] = (D)sum[0];
  d.e[1] = (D)sum[1];
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D> &d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                   MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), line);
}
#line 1 "msl-atomic"
// ---- atomics: real atomic instructions, by which instrument.py tells them from plain accesses ---
enum memory_order { memory_order_relaxed = __ATOMIC_RELAXED };
template <class T> struct atomic { T v; };
template <class T> using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
template <int N> struct BitsOfSize { using type = uint; };
template <> struct BitsOfSize<1> { using type = uchar; };
template <> struct BitsOfSize<8> { using type = ulong; };
template <class T> using Bits = typename BitsOfSize<sizeof(T)>::type;
#define MSL_FETCH(space, operation)                                                                     \
  template <class T, class U>                                                                           \
  METAL_FUNC T atomic_fetch_##operation##_explicit(volatile space atomic<T> *p, U x, memory_order) {    \
    return __atomic_fetch_##operation(&p->v, (T)x, 0);                                                  \
  }
#define MSL_ATOMIC(space)                                                                               \
  template <class T> METAL_FUNC T atomic_load_explicit(const volatile space atomic<T> *p, memory_order) { \
    return as_type<T>(__atomic_load_n((const volatile space Bits<T> *)p, 0));                           \
  }                                                                                                     \
  template <class T, class U>                                                                           \
  METAL_FUNC void atomic_store_explicit(volatile space atomic<T> *p, U x, memory_order) {               \
    __atomic_store_n((volatile space Bits<T> *)p, as_type<Bits<T>>((T)x), 0);                           \
  }                                                                                                     \
  template <class T, class U>                                                                           \
  METAL_FUNC T atomic_exchange_explicit(volatile space atomic<T> *p, U x, memory_order) {               \
    return as_type<T>(__atomic_exchange_n((volatile space Bits<T> *)p, as_type<Bits<T>>((T)x), 0));     \
  }                                                                                                     \
  template <class T, class U>                                                                           \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile space atomic<T> *p, T *expected, U x,  \
                                                        memory_order, memory_order) {                   \
    return __atomic_compare_exchange_n((volatile space Bits<T> *)p, (Bits<T> *)expected,                \
                                       as_type<Bits<T>>((T)x), false, 0, 0);                            \
  }                                                                                                     \
  MSL_FETCH(space, add) MSL_FETCH(space, sub) MSL_FETCH(space, and) MSL_FETCH(space, or)                \
  MSL_FETCH(space, xor) MSL_FETCH(space, max) MSL_FETCH(space, min)
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)
}
using namespace metal;
// ---- MLX's own preamble (metal::utils) ----------------------------------------------------------
template <class U, bool F = is_floating_point_v<U>> struct Limits {
  static constexpr U max = numeric_limits<U>::max(), min = numeric_limits<U>::min();
  static constexpr U finite_max = max, finite_min = min;
};
template <class U> struct Limits<U, true> {
  static constexpr U max = numeric_limits<U>::infinity(), min = -numeric_limits<U>::infinity();
  static constexpr U finite_max = numeric_limits<U>::max(), finite_min = -numeric_limits<U>::max();
};
#define MLX_WIDE_SHUFFLE(name)                                                                          \
  METAL_FUNC uint64_t name(uint64_t x, ushort n, MSL_LINE) {                                            \
    return as_type<uint64_t>(metal::name(as_type<uint2>(x), n, line));                                  \
  }                                                                                                     \
  METAL_FUNC int64_t name(int64_t x, ushort n, MSL_LINE) {                                              \
    return as_type<int64_t>(metal::name(as_type<uint2>(x), n, line));                                   \
  }
MLX_WIDE_SHUFFLE(simd_shuffle) MLX_WIDE_SHUFFLE(simd_shuffle_down) MLX_WIDE_SHUFFLE(simd_shuffle_up)
template <class I = int64_t>
METAL_FUNC I elem_to_loc(I element, constant int *shape, constant int64_t *strides, int ndim) {
  I location = 0;
  for (int d = ndim; d-- > 0; element /= shape[d]) location += (element % shape[d]) * (I)strides[d];
  return location;
}
template <bool B, class X, class Y> using ConditionalType = conditional<B, X, Y>;
struct complex64_t {                                        // just enough for code that mentions it
  float real, imag;
  complex64_t() = default;
  constexpr complex64_t(float r, float i = 0) : real(r), imag(i) {}
  complex64_t operator+(complex64_t o) const { return {real + o.real, imag + o.imag}; }
  complex64_t operator*(complex64_t o) const {
    return {real * o.real - imag * o.imag, real * o.imag + imag * o.real};
  }
};
template <class T, class U> METAL_FUNC T ceildiv(T n, U m) { return (n + m - 1) / m; }
