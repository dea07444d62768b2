# Sourced by tests/gpu/run, which says root, nvcc, cuda, arch: the CUDA backend's test and its bench, built by the two
# compilers alone.
backend=build/gpu-backend
includes=() libs=()

# find_library NAME HEADER ROOT MODULE: beside the toolkit, the system's, or that of a Python package; ROOT first.
find_library() {
  local name=$1 header=$2 dir i l lib
  for dir in ${3:+"$3"} "$cuda" "$cuda/targets/x86_64-linux" /usr/local /usr \
    $(python3 -c "import nvidia.$4 as m; print(list(m.__path__)[0])" 2>/dev/null || true); do
    for i in "$dir/include" "$dir/include/x86_64-linux-gnu"; do
      [[ -f $i/$header ]] || continue
      for l in "$dir/lib64" "$dir/lib" "$dir/lib/x86_64-linux-gnu" "$cuda/lib64" "$cuda/lib"; do
        lib=$(compgen -G "$l/$name.so*" | head -n 1 || true)
        [[ -n $lib ]] || continue
        includes+=(-isystem "$i") && libs+=("$lib" "-Wl,-rpath,$l")
        say "$name: $i, $lib"
        return
      done
    done
  done
  die "$header or $name.so is missing${5:+; $5 may name their folder}"
}

find_libraries() {
  local l
  find_library libcudnn cudnn_graph.h "${CUDNN_ROOT:-}" cudnn CUDNN_ROOT
  find_library libnccl nccl.h "${NCCL_ROOT:-}" nccl NCCL_ROOT
  for l in "$cuda/lib64" "$cuda/lib" "$cuda/targets/x86_64-linux/lib"; do
    [[ ! -d $l ]] || libs+=("-L$l" "-Wl,-rpath,$l")
  done
}

objects=() jobs=()
# compile FILE COMMAND...: in the background, its object in $objects
compile() {
  local object=$backend/${1//\//_}.o
  [[ $1 == tests/* ]] || objects+=("$object")
  "${@:2}" -c "$1" -o "$object" &
  jobs+=($!)
}

build_backend() {
  local f a j program cflags shim=() cmocka=-lcmocka
  find_libraries
  rm -rf "$backend"
  mkdir -p "$backend"
  cflags=(-std=gnu11 -Wall -Wextra -Wpedantic -Werror -D_GNU_SOURCE -fno-strict-aliasing -I. "${includes[@]}"
    -isystem "$cuda/include")
  printf '#include <%s>\n' stdarg.h stddef.h stdint.h setjmp.h cmocka.h | gcc -E - >/dev/null 2>&1 ||
    { shim=(-Itests/gpu/shim) && cmocka=; }
  for f in kernels/cuda/*.cu kernels/cuda/hopper/*.cu; do
    a=$arch
    [[ $f != */hopper/* ]] || a=90a
    compile "$f" "$nvcc" -std=c++17 -O3 -lineinfo -I. -gencode "arch=compute_$a,code=sm_$a" -Xcompiler -Wall,-Wextra
  done
  for f in kernels/*.c kernels/cuda/*.c proto/err.c; do compile "$f" gcc "${cflags[@]}" -O2 -g; done
  for f in kernels/cpu/*.c; do
    compile "$f" gcc "${cflags[@]}" -O3 -g -march=native -fno-math-errno -fno-trapping-math
  done
  compile tests/unit/test_cuda.c gcc "${cflags[@]}" "${shim[@]}" -O1 -g
  compile tests/bench/cuda_bench.c gcc "${cflags[@]}" -O2 -g
  for j in "${jobs[@]}"; do wait "$j" || return 1; done
  for program in test_cuda:tests_unit_test_cuda.c.o cuda_bench:tests_bench_cuda_bench.c.o; do
    g++ -o "$backend/${program%%:*}" "$backend/${program#*:}" "${objects[@]}" "${libs[@]}" -lcublasLt -lcudart $cmocka \
      -lpthread -lm -ldl || return 1
  done
}
