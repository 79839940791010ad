// Runs one Metal dispatch on the CPU and checks it.
//
// Every GPU thread is a fiber on ONE operating-system thread. The 32 fibers of a simdgroup meet at simdgroup
// functions, all fibers of a threadgroup meet at threadgroup_barrier; nothing else switches between them, so
// a run is reproducible. The compiled kernel calls msl_mem1/2/3 before each access to
// device/constant/threadgroup memory. Addresses of threadgroup memory begin at 0: msl_mem3 tells where that is in the
// host.
//
// Freestanding: a handful of C library functions are taken from the host process, and no header is needed.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

extern "C" {
void *mmap(void *, u64, int, int, int, long);
int mprotect(void *, u64, int);
void *calloc(u64, u64);
void *malloc(u64);
void free(void *);
void *memcpy(void *, const void *, u64);
void *memset(void *, int, u64);
u64 strlen(const char *);
int snprintf(char *, u64, const char *, ...);
int vsnprintf(char *, u64, const char *, __builtin_va_list);
u64 pthread_self();
void abort();
}
#define EXPORT extern "C" __attribute__((visibility("default")))

// fma of halves is an instruction that is counted once; for a CPU the compiler turns it into one of doubles, and calls this
// function of its library for the way back. Rounded once: to odd as a float, then to half.
EXPORT _Float16 __truncdfhf2(double x) {
  float f = (float)x;
  u32 bits;
  memcpy(&bits, &f, 4);
  if ((double)f != x && x == x && bits % 2 == 0) {
    bits += __builtin_fabs((double)f) > __builtin_fabs(x) ? -1 : 1;
    memcpy(&f, &bits, 4);
  }
  return (_Float16)f;
}

// ---- what launch.py fills in --------------------------------------------------------------------

struct Buffer {
  u8 *begin, *end;
  u32 *byte_reads, *byte_writes;       // per byte of the buffer
  u64 bytes_read, bytes_written, n_loads, n_stores;
  u32 writable, initialised;
};

struct Span { u64 begin, size; };

struct Dispatch {
  void (*entry)(void **, void *);      // the compiled kernel
  void **arguments;
  Buffer *buffers;
  u64 n_buffers;
  u16 *chunk_owner;                    // arena / 64 KB -> buffer index, or NO_OWNER
  u8 *arena;                           // all buffers lie here, with gaps between them
  u64 arena_size;
  u8 *threadgroup;                     // the memory of the threadgroup
  u64 threadgroup_size;
  Span *threadgroup_variables;         // where they lie in it
  u64 n_threadgroup_variables;
  Span *constants;                     // the program-scope ones
  u64 n_constants;
  u8 *counters;                        // the kernel's block counters, whole pages
  u64 counters_size;
  const u32 *block_lines;              // source line of each counter
  u32 grid[3], group[3];
  u32 order, seed, check_races, past_end, timeout_seconds, padding;
  char *log;
  u64 log_size;
  u64 n_reports, fatal, n_simd_ops, n_barriers, n_threads;
  u64 threadgroup_read, threadgroup_written, constant_read, n_atomics;
};

// ---- fibers -------------------------------------------------------------------------------------

static const u64 STACK_BYTES = 256 << 10, GUARD_BYTES = 64 << 10;
static const u32 MAX_THREADS = 1024, SIMD = 32;
static const u16 NO_OWNER = 0xffff;
static const int PROT_NONE = 0, PROT_READ_WRITE = 3;
static const int MAP_PRIVATE_ANONYMOUS_NORESERVE = 0x4022;

// One simdgroup function in flight: each lane's operand, and the result once a lane has computed it. As in
// msl.h.
struct Exchange {
  alignas(16) u8 lane[32][16];
  alignas(16) u8 result[16];
  u32 mask, done;
};
enum State { READY, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };
struct Fiber {
  void *sp;
  u8 *stack;                           // the guard pages lie at its low end
  State state;
  u32 line;                            // where it waits
  u32 flags;                           // mem_flags of the barrier it waits at
  const void *operand;
  u32 operand_bytes;
  u32 may_diverge;                     // a shuffle: what counts is which lanes it reads
  const void *site;                    // which copy of that line: other calls of a function, or of an unrolled loop
  Exchange *exchange;
};
// thread_position_in_grid and so on, in the order of signature.BUILTINS
struct Attributes { u32 value[20][4]; };

static Dispatch *D;
static Fiber fibers[MAX_THREADS];
static Attributes attributes[MAX_THREADS];
static Exchange exchanges[32][2];          // two per simdgroup: slow lanes may still read the previous one
static u32 exchange_parity[32];
static u32 current;                        // linear index of the running thread in its threadgroup
static u32 group_index, group_threads;
static void *scheduler_sp;
static u32 last_line;                      // of an access to memory
static bool in_fiber;

// void msl_switch(void **save_sp, void *to_sp): push the callee-saved registers, change stacks, pop them.
#if defined(__x86_64__)
asm(R"(.text
.globl msl_switch
.hidden msl_switch
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void *initial_sp(u8 *stack_top, void (*start)()) {
  void **top = (void **)stack_top;
  top[-2] = (void *)start;             // return address; [-1] keeps the ABI's alignment at entry
  return top - 2 - 6;
}
#elif defined(__aarch64__)             // compiles; has not been run
asm(R"(.text
.globl msl_switch
.hidden msl_switch
msl_switch:
  stp x29,x30,[sp,#-160]!
  stp x19,x20,[sp,#16]
  stp x21,x22,[sp,#32]
  stp x23,x24,[sp,#48]
  stp x25,x26,[sp,#64]
  stp x27,x28,[sp,#80]
  stp d8,d9,[sp,#96]
  stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]
  stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp,#16]
  ldp x21,x22,[sp,#32]
  ldp x23,x24,[sp,#48]
  ldp x25,x26,[sp,#64]
  ldp x27,x28,[sp,#80]
  ldp d8,d9,[sp,#96]
  ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]
  ldp d14,d15,[sp,#144]
  ldp x29,x30,[sp],#160
  ret
)");
static void *initial_sp(u8 *stack_top, void (*start)()) {
  void **frame = (void **)stack_top - 20;
  frame[1] = (void *)start;            // x30
  return frame;
}
#endif
extern "C" void msl_switch(void **save_sp, void *to_sp);

static void to_scheduler_for_good() {
  void *never_resumed;
  msl_switch(&never_resumed, scheduler_sp);
}
static void fiber_main() {
  D->entry(D->arguments, &attributes[current]);
  fibers[current].state = DONE;
  to_scheduler_for_good();
  abort();
}
static void start_fiber(u32 t) {
  Fiber &f = fibers[t];
  if (!f.stack) {
    f.stack = (u8 *)mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ_WRITE,
                         MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0);
    mprotect(f.stack, GUARD_BYTES, PROT_NONE);
  }
  f.sp = initial_sp(f.stack + GUARD_BYTES + STACK_BYTES, fiber_main);
  f.state = READY;
}
static void resume(u32 t) {
  current = t;
  in_fiber = true;
  msl_switch(&scheduler_sp, fibers[t].sp);
  in_fiber = false;
}
static void wait(State state, u32 line) {
  Fiber &f = fibers[current];
  f.state = state;
  f.line = line;
  msl_switch(&f.sp, scheduler_sp);
}

// ---- reports ------------------------------------------------------------------------------------

enum Severity { CONTINUE, FATAL };

// Each kind of report is logged once per source line; all are counted. FATAL does not return when called by a
// fiber.
static void report(Severity severity, u32 line, const char *format, ...) {
  static struct { u32 line; const char *format; } seen[64];
  static u64 n_seen;
  if (D->n_reports++ == 0) n_seen = 0;
  u64 k = 0;
  while (k < n_seen && (seen[k].line != line || seen[k].format != format)) k++;
  if (k == n_seen && n_seen < 64) {
    seen[n_seen++] = {line, format};
    u64 n = strlen(D->log);
    auto more = [&](int printed) { n = n + printed < D->log_size ? n + printed : D->log_size - 1; };
    const u32 *p = attributes[current].value[14], *g = attributes[current].value[15];
    // an optimiser that moves an instruction may forget its line
    more(snprintf(D->log + n, D->log_size - n, line ? "line %u: " : "after line %u: ", line ? line : last_line));
    __builtin_va_list values;
    __builtin_va_start(values, format);
    more(vsnprintf(D->log + n, D->log_size - n, format, values));
    __builtin_va_end(values);
    snprintf(D->log + n, D->log_size - n, " [thread %u,%u,%u of group %u,%u,%u]\n", p[0], p[1], p[2], g[0],
             g[1], g[2]);
  }
  if (severity == FATAL) {
    D->fatal = 1;
    if (in_fiber) to_scheduler_for_good();
  }
}
EXPORT void msl_fail(const char *what, u32 line) { report(FATAL, line, "%s", what); }
EXPORT void msl_trap(u32 line) {
  report(FATAL, line, "access out of bounds of the array a pointer points into");
}

// The handlers of clang's undefined-behaviour sanitizer that KERNEL_FLAGS in compile.py can reach.
struct SourceLocation { const char *file; u32 line, column; };
EXPORT void __ubsan_handle_out_of_bounds_abort(SourceLocation *at, u64 index) {
  report(FATAL, at->line, "array index %lld out of bounds", (long long)index);
}
EXPORT void __ubsan_handle_shift_out_of_bounds_abort(SourceLocation *at, u64, u64 n) {
  report(FATAL, at->line, "shift by %lld bits", (long long)n);
}
EXPORT void __ubsan_handle_divrem_overflow_abort(SourceLocation *at, u64, u64) {
  report(FATAL, at->line, "integer division by zero or overflow");
}
EXPORT void __ubsan_handle_missing_return(SourceLocation *at) {
  report(FATAL, at->line, "control reached the end of a non-void function");
}

// ---- faults: guard pages, wild pointers, and the time limit -------------------------------------
// The time limit costs nothing while it is kept: when it passes, msl_expire makes the block counters
// unreadable, and the next basic block of the kernel faults.

struct SignalAction {                  // struct sigaction of glibc and musl
  void (*handler)(int, u8 *, void *);
  u64 mask[16];
  int flags;
  void (*restorer)();
};
struct SignalStack { void *sp; int flags; u64 size; };
extern "C" int sigaction(int, const SignalAction *, SignalAction *);
extern "C" int sigaltstack(const SignalStack *, SignalStack *);
static const int SIGILL = 4, SIGBUS = 7, SIGFPE = 8, SIGSEGV = 11;
static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE}, N_SIGNALS = 4;
static const int SA_SIGINFO = 4, SA_ONSTACK = 0x08000000, SA_NODEFER = 0x40000000;

static SignalAction outer_actions[N_SIGNALS];
static SignalStack outer_stack;
static u64 dispatch_thread;
static u8 signal_stack[64 << 10] __attribute__((aligned(64)));

static void restore_signals() {
  for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &outer_actions[i], nullptr);
}
static void on_fault(int signal, u8 *info, void *) {
  if (!in_fiber || pthread_self() != dispatch_thread) {
    restore_signals();   // not ours: the instruction faults again and meets the process's handler
    return;
  }
  if (signal != SIGSEGV)
    report(FATAL, last_line, "the kernel crashed, after this line, with signal %d", signal);
  u8 *address = *(u8 **)(info + 16);              // siginfo_t.si_addr
  u8 *stack = fibers[current].stack;
  if ((u64)(address - D->counters) < D->counters_size) {
    u32 line = D->block_lines[(address - D->counters) / 8];
    report(FATAL, line, "the kernel did not end within %u seconds", D->timeout_seconds);
  }
  if ((u64)(address - stack) < GUARD_BYTES)
    report(FATAL, last_line, "stack overflow: a thread needs more than %llu bytes",
           (unsigned long long)STACK_BYTES);
  report(FATAL, last_line, "wild pointer to thread memory, after this line: %p", address);
}
static void catch_faults() {
  static SignalStack stack = {signal_stack, 0, sizeof signal_stack};
  SignalAction action = {on_fault, {}, SA_SIGINFO | SA_ONSTACK | SA_NODEFER, nullptr};
  dispatch_thread = pthread_self();
  sigaltstack(&stack, &outer_stack);
  for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &action, &outer_actions[i]);
}
static void leave_faults_alone() {
  restore_signals();
  sigaltstack(&outer_stack, nullptr);
}
EXPORT void msl_expire() { mprotect(D->counters, D->counters_size, PROT_NONE); }   // from another thread

// ---- memory: bounds, alignment, initialisation, races, counts -----------------------------------

// Who touched a byte last, and when. An epoch counts the barriers passed that order this address space.
struct Toucher {
  u32 thread;                       // group_index * MAX_THREADS + linear id in the group + 1; 0: nobody
  u32 group_epoch, simd_epoch;
};
struct Shadow {                                                       // per byte
  Toucher writer, reader;
  u32 readers_of_group_epoch;       // this epoch saw readers from several simdgroups
  u32 readers_of_simd_epoch;        // (+ 1) this one saw several readers in the reader's simdgroup
  u32 initialised;
};
enum Space { DEVICE, THREADGROUP };
static u32 group_epoch[2], simd_epoch[32][2];                         // by Space, the bits of mem_flags
static Shadow *threadgroup_shadow, **device_shadow;

// info as built by instrument.py
static inline u32 alignment_of(u64 info) { return info & 0xffff; }
static inline bool is_write(u64 info) { return info >> 16 & 1; }
static inline bool is_atomic(u64 info) { return info >> 17 & 1; }
static inline bool is_read(u64 info) { return info >> 18 & 1; }
static inline u32 line_of(u64 info) { return info >> 32; }
static inline void note_line(u64 info) { if (line_of(info)) last_line = line_of(info); }
static inline const char *verb(u64 info) { return is_write(info) ? "write" : "read"; }

static inline bool is_ordered(const Toucher &before, const Toucher &me) {
  if (before.thread == 0 || before.thread == me.thread) return true;
  u32 a = before.thread - 1, b = me.thread - 1;
  if (a / MAX_THREADS != b / MAX_THREADS) return false;               // threadgroups are never ordered
  if (before.group_epoch != me.group_epoch) return true;              // a threadgroup_barrier lies between
  return a / SIMD == b / SIMD && before.simd_epoch != me.simd_epoch;  // a simdgroup_barrier lies between
}
static inline bool same_simdgroup(u32 thread, u32 other) { return (thread - 1) / SIMD == (other - 1) / SIMD; }

// A write must also be ordered after readers other than the last one.
static inline bool conflicts_with_readers(const Shadow &s, const Toucher &me) {
  if (!is_ordered(s.reader, me)) return true;
  if (s.reader.group_epoch != me.group_epoch) return false;
  if (s.readers_of_group_epoch == me.group_epoch) return true;
  return same_simdgroup(s.reader.thread, me.thread) && s.readers_of_simd_epoch == me.simd_epoch + 1;
}
static inline void note_reader(Shadow &s, const Toucher &me) {
  bool is_another = s.reader.thread && s.reader.thread != me.thread && s.reader.group_epoch == me.group_epoch;
  if (is_another && !same_simdgroup(s.reader.thread, me.thread)) s.readers_of_group_epoch = me.group_epoch;
  else if (is_another && s.reader.simd_epoch == me.simd_epoch) s.readers_of_simd_epoch = me.simd_epoch + 1;
  s.reader = me;
}
static void report_race(const char *kind, u32 other, u64 info, Space space, u32 buffer, u64 byte) {
  u32 thread = (other - 1) % MAX_THREADS, group = (other - 1) / MAX_THREADS;
  unsigned long long at = byte;
  if (space == DEVICE)
    report(CONTINUE, line_of(info),
           "data race: %s by another thread (linear id %u of group %u), byte %llu of buffer #%u",
           kind, thread, group, at, buffer);
  else
    report(CONTINUE, line_of(info),
           "data race: %s by another thread (linear id %u of group %u), byte %llu of threadgroup variable #%u",
           kind, thread, group, at, buffer);
}
static void check_races(Shadow *s, u64 n_bytes, u64 info, Space space, u32 buffer, u64 offset) {
  Toucher me = {group_index * MAX_THREADS + current + 1, group_epoch[space],
                simd_epoch[current / SIMD][space]};
  bool silent = !D->check_races;
  for (u64 i = 0; i < n_bytes; i++, s++) {
    if (is_atomic(info)) {
      s->initialised = 1;
      continue;
    }
    if (!silent && !is_ordered(s->writer, me)) {
      const char *kind = is_write(info) ? "write after write" : "read after write";
      report_race(kind, s->writer.thread, info, space, buffer, offset + i);
      silent = true;                                                  // one report for one access
    } else if (!silent && is_write(info) && conflicts_with_readers(*s, me)) {
      report_race("write after read", s->reader.thread, info, space, buffer, offset + i);
      silent = true;
    }
    if (is_write(info)) {
      s->writer = me;
      s->initialised = 1;
    } else {
      note_reader(*s, me);
    }
  }
}

static inline void increment(u32 *counts, u64 n) {
  typedef u32 Four __attribute__((vector_size(16), aligned(4)));
  for (; n >= 4; n -= 4, counts += 4) *(Four *)counts += 1;
  for (u64 i = 0; i < n; i++) counts[i]++;
}

static inline void buffer_access(u8 *p, u64 info, u64 n_bytes, bool is_constant) {
  note_line(info);
  u64 arena_offset = p - D->arena;
  if (arena_offset >= D->arena_size) {
    if (is_constant) {                                                // a program-scope constant
      D->constant_read += n_bytes;
      return;
    }
    report(FATAL, line_of(info), "wild device %s at %p", verb(info), p);
  }
  u16 owner = D->chunk_owner[arena_offset >> 16];
  if (owner == NO_OWNER)
    report(FATAL, line_of(info), "out-of-bounds device %s of %u bytes far from any buffer", verb(info),
           (u32)n_bytes);
  Buffer &b = D->buffers[owner];
  u64 offset = p - b.begin;
  if (p < b.begin || p + n_bytes > b.end)
    report(FATAL, line_of(info), "out-of-bounds %s of %u bytes at byte %lld of buffer #%u (%llu bytes)",
           verb(info),
           (u32)n_bytes, (long long)offset, owner, (unsigned long long)(b.end - b.begin));
  if ((u64)p & (alignment_of(info) - 1))
    report(FATAL, line_of(info), "misaligned access: byte %lld of buffer #%u needs alignment %u",
           (long long)offset, owner,
           alignment_of(info));
  if (is_write(info)) {
    if (!b.writable) report(FATAL, line_of(info), "write to read-only buffer #%u", owner);
    b.bytes_written += n_bytes;
    b.n_stores++;
    increment(b.byte_writes + offset, n_bytes);
  }
  if (is_read(info)) {
    b.bytes_read += n_bytes;
    b.n_loads++;
    increment(b.byte_reads + offset, n_bytes);
  }
  if (!b.writable) return;                                            // nobody writes: no races
  Shadow *&shadow = device_shadow[owner];
  if (!shadow) shadow = (Shadow *)calloc(b.end - b.begin, sizeof(Shadow));
  for (u64 i = 0; is_read(info) && !b.initialised && i < n_bytes; i++) {
    if (shadow[offset + i].initialised) continue;
    report(CONTINUE, line_of(info), "read of uninitialised output, byte %llu of buffer #%u",
           (unsigned long long)(offset + i),
           owner);
    break;
  }
  check_races(shadow + offset, n_bytes, info, DEVICE, owner, offset);
}

EXPORT void msl_mem1(u8 *p, u64 info, u64 n_bytes) {
  buffer_access(p, info, n_bytes, false);
  D->n_atomics += is_atomic(info);
}
EXPORT void msl_mem2(u8 *p, u64 info, u64 n_bytes) { buffer_access(p, info, n_bytes, true); }
// Threadgroup variable k has the address k * SPACING, as in instrument.py; an address belongs to the nearest.
static const u32 SPACING = 1 << 20;
static inline u32 variable_of(u32 address) { return (u32)(address + SPACING / 2) / SPACING; }
static inline long distance_from(u32 variable, u32 address) { return (int)(address - variable * SPACING); }
EXPORT u8 *msl_mem3(u32 address, u64 info, u64 n_bytes) {
  note_line(info);
  u32 k = variable_of(address);
  long at = distance_from(k, address);
  if (k >= D->n_threadgroup_variables)
    report(FATAL, line_of(info), "out-of-bounds threadgroup %s of %u bytes far from any variable", verb(info),
           (u32)n_bytes);
  Span &v = D->threadgroup_variables[k];
  if (at < 0 || at + n_bytes > v.size)
    report(FATAL, line_of(info),
           "out-of-bounds threadgroup %s of %u bytes at byte %ld of threadgroup variable #%u (%llu bytes)",
           verb(info), (u32)n_bytes, at, k, v.size);
  if (address & (alignment_of(info) - 1))
    report(FATAL, line_of(info), "misaligned threadgroup access (needs %u)", alignment_of(info));
  if (is_write(info)) D->threadgroup_written += n_bytes;
  if (is_read(info)) D->threadgroup_read += n_bytes;
  D->n_atomics += is_atomic(info);
  Shadow *shadow = threadgroup_shadow + v.begin + at;
  for (u64 i = 0; is_read(info) && i < n_bytes; i++) {
    if (shadow[i].initialised) continue;
    report(CONTINUE, line_of(info),
           "read of uninitialised threadgroup memory, byte %llu of threadgroup variable #%u", at + i, k);
    break;
  }
  check_races(shadow, n_bytes, info, THREADGROUP, k, at);
  return D->threadgroup + v.begin + at;
}

// ---- pointer arithmetic -------------------------------------------------------------------------
// pointers.py has unoptimised code call these. A pointer belongs to the array in or near which it points. It must
// not be before it: addresses of threadgroup memory begin at 0, where 32 bits wrap. That it goes further than one
// past the end is as undefined, but does no harm on a GPU unless it is used: reported if asked for. Program-scope
// constants lie side by side: of these it is always reported.

struct Array { const char *kind; u64 index, size; long at; };   // at: where in it, or outside, the pointer points

static Array array_of(u64 p, u32 space) {
  if (space == 3) {
    u32 k = variable_of(p);
    if (k >= D->n_threadgroup_variables) return {};
    return {"threadgroup variable", k, D->threadgroup_variables[k].size, distance_from(k, p)};
  }
  u64 arena_offset = p - (u64)D->arena;
  u16 owner = arena_offset < D->arena_size ? D->chunk_owner[arena_offset >> 16] : NO_OWNER;
  if (owner == NO_OWNER) return {};                             // null, a constant, or far from any buffer
  Buffer &b = D->buffers[owner];
  return {"buffer", owner, (u64)(b.end - b.begin), (long)(p - (u64)b.begin)};
}
static void report_leaving(const Array &a, long to, u32 line) {
  if (to < 0)
    report(CONTINUE, line, "pointer arithmetic leaves %s #%llu: %ld bytes before its beginning", a.kind, a.index,
           -to);
  else
    report(CONTINUE, line, "pointer arithmetic leaves %s #%llu: %ld bytes beyond its end", a.kind, a.index,
           to - (long)a.size);
}
static void check_arithmetic(u64 from, u64 to, long distance, u32 space, u32 line) {
  Array left = array_of(from, space);
  bool strictly = D->past_end;
  for (u64 k = 0; space == 2 && k < D->n_constants; k++) {
    const Span &c = D->constants[k];
    if (from - c.begin > c.size) continue;
    if (to - c.begin <= c.size) return;
    left = {"constant", k, c.size, (long)(from - c.begin)};
    strictly = true;
  }
  long at = left.at + distance;
  if (left.kind && (at < 0 || (strictly && at > (long)left.size))) report_leaving(left, at, line);
}
static void check_comparison(u64 p, u64 q, u32 space, u32 line) {
  Array a = array_of(p, space), b = array_of(q, space);
  if (a.kind && b.kind && a.index != b.index)
    report(CONTINUE, line, "comparison of a pointer to %s #%llu with one to %s #%llu", a.kind, a.index, b.kind,
           b.index);
}
EXPORT void msl_arithmetic1(u64 from, u64 to, u32 line) { check_arithmetic(from, to, to - from, 1, line); }
EXPORT void msl_arithmetic2(u64 from, u64 to, u32 line) { check_arithmetic(from, to, to - from, 2, line); }
EXPORT void msl_arithmetic3(u32 from, u32 to, u32 line) { check_arithmetic(from, to, (int)(to - from), 3, line); }
EXPORT void msl_comparison1(u64 p, u64 q, u32 line) { check_comparison(p, q, 1, line); }
EXPORT void msl_comparison2(u64 p, u64 q, u32 line) { check_comparison(p, q, 2, line); }
EXPORT void msl_comparison3(u32 p, u32 q, u32 line) { check_comparison(p, q, 3, line); }

// ---- what msl.h calls ---------------------------------------------------------------------------

EXPORT u32 msl_lane() { return current % SIMD; }

// Hand in this lane's operand and wait until every lane that takes part has done so.
EXPORT Exchange *msl_exchange(const void *operand, u32 n_bytes, u32 may_diverge, u32 line) {
  Fiber &f = fibers[current];
  f.operand = operand;
  f.operand_bytes = n_bytes;
  f.may_diverge = may_diverge;
  f.site = __builtin_return_address(0);
  wait(AT_SIMD, line);
  return f.exchange;
}
EXPORT void msl_barrier(int is_simdgroup, int flags, u32 line) {
  fibers[current].flags = flags;
  wait(is_simdgroup ? AT_SIMD_BARRIER : AT_BARRIER, line);
}

// float -> bfloat, round to nearest even. clang calls this; the result is the low half of the register.
EXPORT float __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  return __builtin_bit_cast(float, x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- scheduler ----------------------------------------------------------------------------------

enum Order { NATURAL, REVERSED, RANDOM };
static u32 random_state;
static u32 random_below(u32 n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (u32)(((u64)random_state * n) >> 32);
}
static void schedule(u32 *order, u32 n) {
  for (u32 i = 0; i < n; i++) order[i] = D->order == REVERSED ? n - 1 - i : i;
  if (D->order != RANDOM) return;
  for (u32 i = n; i > 1; i--) {
    u32 j = random_below(i), swapped = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swapped;
  }
}

// The lanes that wait at the leader's simdgroup function or barrier do it together.
static void release_lanes(u32 simdgroup, u32 n_lanes, u32 leader, u32 n_live) {
  Fiber *lanes = fibers + simdgroup * SIMD;
  State state = lanes[leader].state;
  u32 line = lanes[leader].line, mask = 0, together = 0;
  for (u32 i = 0; i < n_lanes; i++) {
    if (lanes[i].state != state || lanes[i].line != line) continue;
    if (state == AT_SIMD && lanes[i].site != lanes[leader].site) continue;
    mask |= 1u << i;
    together++;
  }
  current = simdgroup * SIMD + leader;
  if (together != n_live && !(state == AT_SIMD && lanes[leader].may_diverge))
    report(CONTINUE, line, "%s in divergent control flow: %u of %u live lanes",
           state == AT_SIMD ? "simdgroup function" : "simdgroup_barrier", together, n_live);
  Exchange *exchange = nullptr;
  if (state == AT_SIMD_BARRIER) {
    D->n_barriers++;
    for (int space = 0; space < 2; space++) simd_epoch[simdgroup][space] += lanes[leader].flags >> space & 1;
  } else {
    D->n_simd_ops++;
    exchange = &exchanges[simdgroup][exchange_parity[simdgroup] ^= 1];
    exchange->mask = mask;
    exchange->done = 0;
  }
  for (u32 i = 0; i < n_lanes; i++) {
    if (!(mask >> i & 1)) continue;
    if (exchange) memcpy(exchange->lane[i], lanes[i].operand, lanes[i].operand_bytes);
    lanes[i].exchange = exchange;
    lanes[i].state = READY;
  }
}

// Run one simdgroup until every lane is done or waits at a threadgroup barrier.
static void run_simdgroup(u32 simdgroup) {
  u32 first = simdgroup * SIMD, left = group_threads - first;
  u32 n_lanes = left < SIMD ? left : SIMD, order[SIMD];
  for (;;) {
    schedule(order, n_lanes);
    for (u32 i = 0; i < n_lanes; i++) {
      if (fibers[first + order[i]].state != READY) continue;
      resume(first + order[i]);
      if (D->fatal) return;
    }
    u32 n_live = 0, n_blocked = 0, leader = 0;
    for (u32 i = 0; i < n_lanes; i++) {
      Fiber &f = fibers[first + i];
      n_live += f.state != DONE;
      if (f.state != AT_SIMD && f.state != AT_SIMD_BARRIER) continue;
      // diverged lanes: earliest line first
      if (!n_blocked++ || f.line < fibers[first + leader].line) leader = i;
    }
    if (!n_blocked) return;
    release_lanes(simdgroup, n_lanes, leader, n_live);
  }
}

static void set_attributes(u32 t, const u32 *group_at, const u32 *size, const u32 *n_groups) {
  u32 n = size[0] * size[1] * size[2], full = D->group[0] * D->group[1] * D->group[2];
  u32 local[3] = {t % size[0], t / size[0] % size[1], t / (size[0] * size[1])}, global[3];
  for (int k = 0; k < 3; k++) global[k] = group_at[k] * D->group[k] + local[k];
  const u32 zero[3] = {};
  u32 slot = 0;
  auto add = [&](u32 value) { attributes[t].value[slot++][0] = value; };
  auto add3 = [&](const u32 *value) { memcpy(attributes[t].value[slot++], value, 12); };
  add((full + 3) / 4);              // dispatch_quadgroups_per_threadgroup
  add((full + SIMD - 1) / SIMD);    // dispatch_simdgroups_per_threadgroup
  add3(D->group);                   // dispatch_threads_per_threadgroup
  add3(zero);                       // grid_origin
  add3(D->grid);                    // grid_size
  add(t / 4);                       // quadgroup_index_in_threadgroup
  add((n + 3) / 4);                 // quadgroups_per_threadgroup
  add(t / SIMD);                    // simdgroup_index_in_threadgroup
  add((n + SIMD - 1) / SIMD);       // simdgroups_per_threadgroup
  add(SIMD);                        // thread_execution_width
  add(t % 4);                       // thread_index_in_quadgroup
  add(t % SIMD);                    // thread_index_in_simdgroup
  add(t);                           // thread_index_in_threadgroup
  add3(global);                     // thread_position_in_grid
  add3(local);                      // thread_position_in_threadgroup: value[14], as report() expects
  add3(group_at);                   // threadgroup_position_in_grid: value[15]
  add3(n_groups);                   // threadgroups_per_grid
  add3(D->grid);                    // threads_per_grid
  add(SIMD);                        // threads_per_simdgroup
  add3(size);                       // threads_per_threadgroup
}

// Every fiber is done or waits at a threadgroup barrier. Returns whether the threadgroup goes on.
static bool release_threadgroup() {
  u32 n_waiting = 0, n_done = 0, first = 0, other_line = 0;
  for (u32 t = 0; t < group_threads; t++) {
    if (fibers[t].state == DONE) {
      n_done++;
      continue;
    }
    if (!n_waiting++) first = t;
    if (fibers[t].line != fibers[first].line) other_line = fibers[t].line;
  }
  if (!n_waiting) return false;
  current = first;
  u32 line = fibers[first].line;
  if (n_done)
    report(FATAL, line, "threadgroup_barrier not reached by all threads: %u wait, %u have returned",
           n_waiting, n_done);
  else if (other_line)
    report(FATAL, line,
           "threadgroup_barrier in divergent control flow: some threads wait at line %u, others at line %u",
           line, other_line);
  if (D->fatal) return false;
  D->n_barriers++;
  for (int space = 0; space < 2; space++) {
    if (!(fibers[first].flags >> space & 1)) continue;
    group_epoch[space]++;
    for (u32 i = 0; i < 32; i++) simd_epoch[i][space]++;
  }
  for (u32 t = 0; t < group_threads; t++) fibers[t].state = READY;
  return true;
}

static void run_group(const u32 *group_at, const u32 *size, const u32 *n_groups) {
  group_threads = size[0] * size[1] * size[2];
  u32 n_simdgroups = (group_threads + SIMD - 1) / SIMD, order[32];
  for (u32 t = 0; t < group_threads; t++) {
    set_attributes(t, group_at, size, n_groups);
    start_fiber(t);
  }
  D->n_threads += group_threads;
  if (D->threadgroup_size) {  // poison: NaN as float, large as integer
    memset(D->threadgroup, 0xff, D->threadgroup_size);
    memset(threadgroup_shadow, 0, D->threadgroup_size * sizeof(Shadow));
  }
  do {
    schedule(order, n_simdgroups);
    for (u32 i = 0; i < n_simdgroups && !D->fatal; i++) run_simdgroup(order[i]);
  } while (!D->fatal && release_threadgroup());
}

EXPORT void msl_dispatch(Dispatch *dispatch) {
  D = dispatch;
  random_state = D->seed;
  device_shadow = (Shadow **)calloc(D->n_buffers + 1, sizeof *device_shadow);
  threadgroup_shadow = (Shadow *)calloc(D->threadgroup_size + 1, sizeof *threadgroup_shadow);
  group_epoch[DEVICE] = group_epoch[THREADGROUP] = 1;
  memset(simd_epoch, 0, sizeof simd_epoch);
  u32 n_groups[3];
  for (int k = 0; k < 3; k++) n_groups[k] = (D->grid[k] + D->group[k] - 1) / D->group[k];
  u32 total = n_groups[0] * n_groups[1] * n_groups[2];
  u32 *order = (u32 *)malloc(sizeof(u32) * (total + 1));
  schedule(order, total);
  catch_faults();
  for (u32 i = 0; i < total && !D->fatal; i++) {
    group_index = order[i];
    u32 at[3] = {group_index % n_groups[0], group_index / n_groups[0] % n_groups[1],
                 group_index / (n_groups[0] * n_groups[1])};
    u32 size[3];
    for (int k = 0; k < 3; k++) {  // the last group of an axis may be smaller
      u32 left = D->grid[k] - at[k] * D->group[k];
      size[k] = left < D->group[k] ? left : D->group[k];
    }
    run_group(at, size, n_groups);
  }
  leave_faults_alone();
  mprotect(D->counters, D->counters_size, PROT_READ_WRITE);
  in_fiber = false;
  for (u64 i = 0; i < D->n_buffers; i++) free(device_shadow[i]);
  free(device_shadow);
  free(threadgroup_shadow);
  free(order);
}
