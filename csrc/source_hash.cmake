# Writes ${OUTPUT}, a header that tells which sources the library is made of; fourbit.native compares
# it with csrc/ in a checkout. Run at build time: cmake -DSOURCE=... -DOUTPUT=... -P source_hash.cmake
file(GLOB paths RELATIVE ${SOURCE}
  ${SOURCE}/*.h ${SOURCE}/*.cpp ${SOURCE}/isa/*.cpp ${SOURCE}/kernels/*.h ${SOURCE}/CMakeLists.txt)
list(SORT paths)
set(listing "")
foreach(path IN LISTS paths)
  file(SHA256 ${SOURCE}/${path} digest)
  string(APPEND listing "${path} ${digest}\n")
endforeach()
string(SHA256 digest "${listing}")
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT "#define FB_SOURCE_HASH \"${digest}\"\n")
